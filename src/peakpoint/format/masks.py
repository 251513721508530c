"""Weights that ``torch.nn.utils.prune`` keeps as an original and a mask: their product is the weight."""

from collections.abc import Mapping

ORIGINAL, MASK = "_orig", "_mask"


def masks_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Tell which tensors are masked: name of the original to name of its mask, which is no weight of its own.

    Args:
        shapes: of all tensors of a part, by name.

    Example:
        >>> masks_of({"0.weight_orig": (2, 3), "0.weight_mask": (2, 3), "0.bias": (2,), "attention_mask": (9, 9)})
        {'0.weight_orig': '0.weight_mask'}
    """
    pairs = {name: name.removesuffix(ORIGINAL) + MASK for name in shapes if name.endswith(ORIGINAL)}
    return {original: mask for original, mask in pairs.items() if shapes.get(mask) == shapes[original]}
