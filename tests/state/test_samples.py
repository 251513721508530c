"""What is written past the version counters while a copy is under way is found, and never committed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import peakpoint as pp
from peakpoint.state.host_copy import ChangedError, storage_of
from peakpoint.state.samples import LEAST_SAMPLES, SMALL, Samples
from peakpoint.state.shared_storage import DTYPES
from peakpoint.state.tensor_files import StagingBuffer
from training import checkpointer, kept, same


def by_data(tensor, values):
    tensor.data.copy_(values)


def by_numpy(tensor, values):
    tensor.detach().numpy()[...] = values.numpy()


def by_alias(tensor, values):
    alias = torch.empty(0).set_(tensor.untyped_storage(), 0, (tensor.numel(),), (1,))
    alias.as_strided(tensor.shape, tensor.stride()).copy_(values)


WAYS = [by_data, by_numpy, by_alias]
SHAPES = st.one_of(
    st.tuples(st.integers(1, 20_000)),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(1, 7), st.integers(1, 7)),
)
FORMATS = {4: [torch.contiguous_format, torch.channels_last]}


@st.composite
def weights(draw):
    """Tensors, some of them sparse, and what they are rewritten with."""
    tensors = []
    for shape in draw(st.lists(SHAPES, min_size=1, max_size=3)):
        layout = draw(st.sampled_from(FORMATS.get(len(shape), [torch.contiguous_format])))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        tensor = torch.randn(shape, generator=generator)
        if draw(st.booleans()):  # half of it pruned, or whole rows
            rows = tensor.shape if draw(st.booleans()) else (shape[0], *[1] * (len(shape) - 1))
            tensor = tensor * (torch.rand(rows, generator=generator) > 0.5)
        tensors.append(tensor.to(memory_format=layout))
    return tensors


@given(
    weights(), st.sampled_from(WAYS), st.sampled_from(["before", "after", "there and back"]), st.booleans(), st.data()
)
def test_a_rewrite_is_refused_or_the_copy_is_that_of_the_capture(tensors, write, when, step, data):
    rewritten = data.draw(st.sets(st.integers(0, len(tensors) - 1)))
    before = [tensor.clone() for tensor in tensors]
    files = {"model.safetensors": {str(number): tensor for number, tensor in enumerate(tensors)}}
    staging = StagingBuffer()
    images, copying = staging.capture(files, frozenset(map(storage_of, tensors)))
    if when == "after":
        copying.run()
    for number in rewritten:
        write(tensors[number], tensors[number] * 2)
    copying.run()
    if when == "there and back":
        for number in rewritten:
            write(tensors[number], before[number])
    if step:
        copying.hold_step()
        for tensor in tensors:
            tensor.add_(1)
    large = [number for number in rewritten if before[number].nbytes > SMALL and before[number].any()]
    try:
        copying.settle()
    except ChangedError:
        assert large
        return
    assert not large
    copies = copied(images[0])
    assert all(same(copies[str(number)], values.contiguous()) for number, values in enumerate(before))


def copied(image):
    from safetensors.torch import load

    return load(bytes(image.data))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_has_samples(dtype):
    tensor = torch.randint(0, 2, (300, 257)).to(dtype)
    samples = Samples([torch.zeros(3), tensor])
    before = samples.take([torch.zeros(3), tensor])
    assert samples.differing(before, samples.take([torch.zeros(3), tensor.clone()])) is None
    tensor.view(torch.uint8).view(-1)[-1] ^= 1  # the last element is always one
    assert samples.differing(before, samples.take([torch.zeros(3), tensor])) == 1


@given(st.integers(1, 5000), st.integers(1, 64))
def test_samples_meet_every_column(rows, columns):
    count = rows * columns
    (group,) = Samples([torch.empty(count, dtype=torch.uint8)])._groups
    ((number,), (step,), first) = group.places[0]
    assert first + (number - 1) * step == count - 1
    assert number >= min(count, LEAST_SAMPLES)
    assert len({(first + at * step) % columns for at in range(number)}) >= min(columns, number)


@torch.no_grad()
def swap_back(parameter, values, way):
    if way == "data":
        parameter.data.copy_(values)
    elif way == "no_grad":
        parameter.copy_(values)
    else:
        parameter.data = values


@pytest.mark.parametrize("way", ["data", "no_grad", "another tensor"])
def test_averaged_weights_that_are_swapped_back_are_never_committed_torn(tmp_path, way):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(600, 600) for _ in range(4)])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    refused = []
    with checkpointer(tmp_path, state={"model": model, "optimizer": optimizer}) as ckpt:
        for epoch in range(4):
            model(torch.randn(4, 600)).pow(2).mean().backward()
            optimizer.step()
            backup = [parameter.detach().clone() for parameter in model.parameters()]
            for parameter in model.parameters():
                parameter.data.fill_(epoch + 1)
            ckpt.report(epoch=epoch)
            for parameter, values in zip(model.parameters(), backup, strict=True):
                swap_back(parameter, values, way)
            try:
                ckpt.wait()
            except pp.SaveFailedError as error:
                refused.append(str(error))
    assert len(refused) == (0 if way == "another tensor" else 4)
    assert all("overlap=False" in text for text in refused)
    for checkpoint in kept(tmp_path):
        saved = pp.load(checkpoint.ref, root=tmp_path)["model"]
        assert all((values == checkpoint.epoch + 1).all() for values in saved.values())
