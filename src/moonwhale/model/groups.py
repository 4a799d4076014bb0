"""Items lined up by group: (token, expert) pairs by expert in moe.py, (query, block) pairs by block in moba.py."""

import torch
from torch import Tensor

from .kernels import compiled_for_groups


def line_up(
    group: Tensor, n_groups: int, multiple: int, static_shapes: bool, row_multiple: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort items into rows by their `group` (N,), and pad each group's rows to a multiple of `multiple`.

    An item of group `n_groups` gets no row. With `static_shapes` no value is read: the rows are as many as N items can
    need. Otherwise they are as many as these items need, filled up to a multiple of `row_multiple`.

    Returns:
        the item of each row (R,), -1 for padding; the row of each item (N,), R if it has none; the end of each group's
        rows (n_groups,).
    """
    if not static_shapes and (compiled := compiled_for_groups(group)):
        return compiled.line_up(group, n_groups, multiple, row_multiple)
    group, item = group.sort(stable=True)
    last = torch.searchsorted(group, torch.arange(n_groups, device=group.device), right=True)
    sizes = last.diff(prepend=last.new_zeros(1))
    padded_sizes = -(-sizes // multiple) * multiple
    ends = padded_sizes.cumsum(0)
    if static_shapes:
        n_rows = (len(item) + n_groups * (multiple - 1)) // multiple * multiple
    else:
        n_rows = -(-int(ends[-1]) // row_multiple) * row_multiple

    shift = (ends - padded_sizes) - (last - sizes)  # from an item's rank to its row
    row = torch.arange(len(item), device=group.device) + shift[group.clamp(max=n_groups - 1)]
    row.masked_fill_(group == n_groups, n_rows)
    item_of_row = item.new_full((n_rows + 1,), -1)  # the last row takes the items that get none
    item_of_row[row] = item
    return item_of_row[:-1], torch.empty_like(row).scatter_(0, item, row), ends
