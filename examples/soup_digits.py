"""Three checkpoints of one run, together: ``python soup_digits.py OUT [SEEDS]``.

LeNet-5 on scikit-learn's digits: 600 images to train, 400 to choose by (validation), 797 held out for the table and
looked at only there. The learning rate stays where it is, so the last epochs lie around a minimum rather than in it:
that is where means help. Each seed trains, and draws the split, anew; the three best checkpoints of the second half
by validation accuracy become an ensemble, a uniform and a greedy soup. Some seconds a seed on a CPU; needs
``pip install 'peakpoint[demo]'``.
"""

import sys
from pathlib import Path

import torch

import peakpoint as pp
from peakpoint.cli.demo.training import LeNet5, digits

TRAINING, VALIDATION, EPOCHS, BATCH = 600, 400, 40, 32
out, seeds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
torch.set_num_threads(1)  # the same numbers for any number of cores; not on every processor
every_image, every_label = digits()


def accuracy(model, images, labels):
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def trained(run, seed):
    """Train, keeping the best three; returns the validation and the held-out images with their labels."""
    torch.manual_seed(seed)
    order = torch.randperm(len(every_image))
    images, labels = every_image[order], every_label[order]
    chosen_by = slice(TRAINING, TRAINING + VALIDATION)
    held_out = slice(TRAINING + VALIDATION, None)
    model = LeNet5()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with pp.Checkpointer(
        out / "runs",
        run=run,
        state={"model": model, "optimizer": optimizer},
        keep=[pp.TopK("val_accuracy", "max", 3, min_epoch=EPOCHS // 2), pp.Last(1)],
        resume="never",
    ) as ckpt:
        for _ in ckpt.epochs(EPOCHS):
            model.train()
            for batch in torch.randperm(TRAINING).split(BATCH):
                shifted = torch.roll(images[batch], tuple(torch.randint(-2, 3, (2,)).tolist()), dims=(2, 3))
                loss = torch.nn.functional.cross_entropy(model(shifted), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            ckpt.report(val_accuracy=accuracy(model, images[chosen_by], labels[chosen_by]))
    return (images[chosen_by], labels[chosen_by]), (images[held_out], labels[held_out])


def compared(seed):
    """Held-out accuracies of the three members, the ensemble, the uniform and the greedy soup."""
    root, run = out / "runs", f"digits-{seed}"
    validation, held_out = trained(run, seed)
    best = pp.select(root, f"run == '{run}' and epoch >= {EPOCHS // 2}", by={"val_accuracy": "max"}, top=3)
    refs = [checkpoint.ref for checkpoint in best]

    def loaded(ref):
        model = LeNet5()
        pp.load(ref, root=root, into=model)
        return model

    def score(model):
        return accuracy(model, *validation)

    together = pp.ensemble(refs, LeNet5, root=root)
    uniform = pp.soup(refs, root=root, evaluate=score, metric="val_accuracy", build_model=LeNet5)
    greedy = pp.soup(
        refs, root=root, kind="greedy", evaluate=score, metric="val_accuracy", mode="max", build_model=LeNet5
    )
    members = [accuracy(loaded(ref), *held_out) for ref in refs]
    soups = [accuracy(loaded(made.checkpoint.ref), *held_out) for made in (uniform, greedy)]
    return *members, sum(members) / 3, accuracy(together, *held_out), *soups, len(greedy.members)


print("held-out accuracy in %; members in the order of their validation accuracy\n")
print("| seed | 1st | 2nd | 3rd | their mean | ensemble | uniform soup | greedy soup | of |")
print("|---|---|---|---|---|---|---|---|---|")
rows = []
for seed in range(seeds):
    rows.append(compared(seed))
    *values, count = rows[-1]
    print(f"| {seed} | {' | '.join(f'{100 * value:.2f}' for value in values)} | {count} |", flush=True)
if seeds > 1:
    means = [100 * sum(column) / seeds for column in list(zip(*rows, strict=True))[:-1]]
    print(f"| mean | {' | '.join(f'{value:.2f}' for value in means)} | |")
