"""The programs that `kernels_library.py` launches, in Triton's language. Only this file imports Triton, at first use.

A map is [N, C, T, H, W] with any strides. A program instance writes a tile of [ROWS, COLUMNS] values of a dense map.
Rows are (n, c, t) and columns (h, w); with channels last (LAST) rows are (n, t, h) and columns (w, c). So neighboring
values are neighbors in memory at every size, and n, c, t, h and w cost a division per row and column, not per value.

Sums are float32 and are rounded once, when they are stored. The programs call builtins of Triton only, not functions that
are programs themselves (tl.cdiv, tl.zeros): those are compiled or interpreted according to how Triton was imported.
"""

import triton
import triton.language as tl


@triton.jit
def pool(
    x, y, rows, columns, C, T, H, W, x_n, x_c, x_t, x_h, x_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, MEAN: tl.constexpr,
    LAST: tl.constexpr, LARGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = sums, or means, over the windows of x that is [N, C, T, H, W]; y is dense and has rows * columns values."""
    row, column, here = _tile(rows, columns, LARGE, ROWS, COLUMNS)
    n, c, t, h, w = _place(row, column, C, (T + KT - 1) // KT, (H + KH - 1) // KH, (W + KW - 1) // KW, LAST)
    t, h, w = t * KT, h * KH, w * KW
    corner = x + n * x_n + c * x_c + t * x_t + h * x_h + w * x_w
    total = tl.full([ROWS, COLUMNS], 0.0, tl.float32)
    for dt in tl.static_range(KT):
        plane = tl.full([ROWS, COLUMNS], 0.0, tl.float32)  # space before time, in the order of the eager form
        for dh in tl.static_range(KH):
            for dw in tl.static_range(KW):
                exists = here & (t + dt < T) & (h + dh < H) & (w + dw < W)
                value = tl.load(corner + dt * x_t + dh * x_h + dw * x_w, mask=exists, other=0.0)
                plane += value.to(tl.float32)
        total += plane
    if MEAN:
        total *= _share(t, T, KT) * _share(h, H, KH) * _share(w, W, KW)
    tl.store(y + row * columns + column, total.to(y.dtype.element_ty), mask=here)


@triton.jit
def upsample_add(
    out, y, low, shortcut, rows, columns, C, T, H, W,
    y_n, y_c, y_t, y_h, y_w, low_n, low_c, low_t, low_h, low_w,
    shortcut_n, shortcut_c, shortcut_t, shortcut_h, shortcut_w,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, MEAN: tl.constexpr, RELU: tl.constexpr,
    IN_PLACE: tl.constexpr, Y_DENSE: tl.constexpr, SHORTCUT_DENSE: tl.constexpr,
    LAST: tl.constexpr, LARGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store out = relu(y + upsampled low + shortcut); y and shortcut may be None.

    out, y and shortcut are [N, C, T, H, W]. MEAN divides low by the number of values in its window. out is dense, or with
    IN_PLACE it is y. A DENSE map is read without strides: their sum would hide from the compiler that several values can
    be read at once.
    """
    row, column, here = _tile(rows, columns, LARGE, ROWS, COLUMNS)
    n, c, t, h, w = _place(row, column, C, T, H, W, LAST)
    source = low + n * low_n + c * low_c + t // KT * low_t + h // KH * low_h + w // KW * low_w
    value = tl.load(source, mask=here, other=0.0).to(tl.float32)
    if MEAN:
        value *= _share(t // KT * KT, T, KT) * _share(h // KH * KH, H, KH) * _share(w // KW * KW, W, KW)
    at = row * columns + column
    if y is not None:
        y_at = at if Y_DENSE else n * y_n + c * y_c + t * y_t + h * y_h + w * y_w
        value += tl.load(y + y_at, mask=here, other=0.0).to(tl.float32)
        if IN_PLACE:
            at = y_at
    if shortcut is not None:
        source = n * shortcut_n + c * shortcut_c + t * shortcut_t + h * shortcut_h + w * shortcut_w
        source = row * columns + column if SHORTCUT_DENSE else source
        value += tl.load(shortcut + source, mask=here, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0.0, 0.0, value)  # NaN passes, as in torch; tl.maximum would drop it
    tl.store(out + at, value.to(out.dtype.element_ty), mask=here)


@triton.jit
def _tile(rows, columns, LARGE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """row [ROWS, 1], column [1, COLUMNS] of this instance and whether they exist; int64 where offsets need it."""
    tile = tl.program_id(0)  # one axis: the others end at 65535
    across = (columns + COLUMNS - 1) // COLUMNS
    down, along = tile // across, tile % across
    if LARGE:
        down, along = down.to(tl.int64), along.to(tl.int64)
    row = down * ROWS + tl.arange(0, ROWS)[:, None]
    column = along * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def _place(row, column, C, T, H, W, LAST: tl.constexpr):
    """(n, c, t, h, w) of a row and a column of a map of C channels and size T, H, W."""
    if LAST:
        n, t, h = row // H // T, row // H % T, row % H
        w, c = column // C, column % C
    else:
        n, c, t = row // T // C, row // T % C, row % T
        h, w = column // W, column % W
    return n, c, t, h, w


@triton.jit
def _share(start, size, K: tl.constexpr):
    """1 / number of values that exist in a window of K (1 or 2) from `start`; exact, as a division need not be."""
    return tl.where(start + K <= size, 1.0 / K, 1.0)
