"""Turn raw predictions into detections in Triton: four kernels in fixed shapes, with no wait in between.

Every kernel takes all B images of a batch. The candidates of an image are its (anchor, class) pairs above
its threshold. There is memory for C of them; an image with more than allowed is skipped and marked in the
result.

All arithmetic is float32 and, except for the order of sums inside a softmax, operation for operation that of
`boxes` as torch computes it on CUDA. Run the kernels with `enable_fp_fusion=False`: a multiplication fused
with an addition rounds once where torch rounds twice, and an IoU could cross its threshold.
"""
# Triton ships no types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

# Columns of the control tensor, 32 bits each; an image has one row, which ends with the bits of its classes.
LOGIT_BOUND = tl.constexpr(0)  # float32, a little below the logit of the score threshold
SCORE_THRESHOLD = tl.constexpr(1)  # float32
IOU_THRESHOLD = tl.constexpr(2)  # float32
SCALE_X = tl.constexpr(3)  # float32, width of the original image over that of the network input
SCALE_Y = tl.constexpr(4)  # float32
LIMIT = tl.constexpr(5)  # int32, most detections to return
AGNOSTIC = tl.constexpr(6)  # int32, 1 if boxes of different classes suppress each other
CLASS_BITS = tl.constexpr(7)  # int32 words; bit k % 32 of word k // 32 is 1 if class k is requested

# Columns of the result, which has one row per detection. An image's first row is its header.
RESULT_COLUMNS = tl.constexpr(6)  # x1, y1, x2, y2, score, class
RETURNED = tl.constexpr(0)  # header: number of detections
OVERFLOWED = tl.constexpr(1)  # header: 1 if the detections are incomplete

# A key's low half is the flat id with all 31 bits flipped: of equal scores the lower id has the greater key.
ID_BITS = tl.constexpr(0x7FFFFFFF)

# Lowers a threshold by more than the rounding of a few float32 operations.
LOWERED = tl.constexpr(1 - 1e-6)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def find_candidates(
    class_logits_8_ptr,  # one tensor per level, any strides
    class_logits_16_ptr,
    class_logits_32_ptr,
    control_floats_ptr,  # B, W float32
    control_words_ptr,  # the same memory as int32
    counts_ptr,  # B int32, zero before
    keys_ptr,  # B, C int64
    LEVELS: tl.constexpr,  # of each: first anchor, height, width, pixels per cell, strides of B, C, h, w
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    CONTROL_WIDTH: tl.constexpr,
    BLOCKS_8: tl.constexpr,  # blocks of stride 8
    BLOCKS_16: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Count the candidates of each image and write their keys in any order; grid (blocks, B)."""
    block = tl.program_id(0)
    image = tl.program_id(1)
    floats_ptr = control_floats_ptr + image * CONTROL_WIDTH
    words_ptr = control_words_ptr + image * CONTROL_WIDTH
    count_ptr = counts_ptr + image
    image_keys_ptr = keys_ptr + image * CAPACITY
    if block < BLOCKS_8:
        _scan_level(
            class_logits_8_ptr, block, image, floats_ptr, words_ptr, count_ptr, image_keys_ptr,
            LEVELS, 0, K, CAPACITY, BLOCK, STEP,
        )  # fmt: skip
    elif block < BLOCKS_8 + BLOCKS_16:
        _scan_level(
            class_logits_16_ptr, block - BLOCKS_8, image, floats_ptr, words_ptr, count_ptr,
            image_keys_ptr, LEVELS, 1, K, CAPACITY, BLOCK, STEP,
        )  # fmt: skip
    else:
        _scan_level(
            class_logits_32_ptr, block - BLOCKS_8 - BLOCKS_16, image, floats_ptr, words_ptr, count_ptr,
            image_keys_ptr, LEVELS, 2, K, CAPACITY, BLOCK, STEP,
        )  # fmt: skip


@triton.jit
def _scan_level(
    logits_ptr,
    block,
    image,
    floats_ptr,
    words_ptr,
    count_ptr,
    keys_ptr,
    LEVELS: tl.constexpr,
    LEVEL: tl.constexpr,
    K: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    bound = tl.load(floats_ptr + LOGIT_BOUND)
    block_ids = block * BLOCK + tl.arange(0, BLOCK)
    block_logits = _load_class_logits(logits_ptr, block_ids, image, LEVELS, LEVEL, K)
    if tl.max((block_logits > bound).to(tl.int32), axis=0) > 0:  # most blocks end here; NaN is not above
        threshold = tl.load(floats_ptr + SCORE_THRESHOLD)
        # Read again in small steps: a single step would need registers for many loads in flight.
        for first in range(0, BLOCK, STEP):
            ids = block * BLOCK + first + tl.arange(0, STEP)
            logits = _load_class_logits(logits_ptr, ids, image, LEVELS, LEVEL, K)
            near = logits > bound
            if tl.max(near.to(tl.int32), axis=0) > 0:
                class_ids = ids % K
                words = tl.load(words_ptr + CLASS_BITS + class_ids // 32, mask=near, other=0)
                requested = ((words >> (class_ids % 32)) & 1) == 1
                scores = tl.div_rn(tl.full([STEP], 1.0, tl.float32), 1.0 + _exp(-logits))
                hits = near & requested & (scores > threshold)
                # One addition per hit: hits are few, and a sum over the block would stall all threads.
                slots = tl.atomic_add(count_ptr + tl.zeros([STEP], tl.int32), 1, mask=hits, sem="relaxed")
                # The bits of positive floats are in the order of the floats.
                score_bits = scores.to(tl.int32, bitcast=True).to(tl.int64)
                keys = (score_bits << 32) | ((LEVELS[LEVEL][0] * K + ids) ^ ID_BITS).to(tl.int64)
                tl.store(keys_ptr + slots, keys, mask=hits & (slots < CAPACITY))


@triton.jit
def _load_class_logits(logits_ptr, ids, image, LEVELS: tl.constexpr, LEVEL: tl.constexpr, K: tl.constexpr):
    """Logits as float32; id = cell * K + class, so that consecutive ids are adjacent in channels_last."""
    cells = ids // K
    WIDTH: tl.constexpr = LEVELS[LEVEL][2]
    places = cells // WIDTH * LEVELS[LEVEL][6] + cells % WIDTH * LEVELS[LEVEL][7] + ids % K * LEVELS[LEVEL][5]
    inside = ids < LEVELS[LEVEL][1] * WIDTH * K
    logits_ptr += image.to(tl.int64) * LEVELS[LEVEL][4]
    return tl.load(logits_ptr + places, mask=inside, other=-float("inf")).to(tl.float32)


@triton.jit
def rank_and_decode(
    distance_logits_8_ptr,  # one tensor per level, any strides
    distance_logits_16_ptr,
    distance_logits_32_ptr,
    counts_ptr,  # B int32
    keys_ptr,  # B, C int64, in any order
    boxes_ptr,  # B, 4, C float32, pixels of the network input
    scores_ptr,  # B, C float32
    class_ids_ptr,  # B, C int32
    LEVELS: tl.constexpr,  # of each: first anchor, height, width, pixels per cell, strides of B, C, h, w
    K: tl.constexpr,
    BIN_COUNT: tl.constexpr,  # R + 1
    PADDED_BINS: tl.constexpr,  # the next power of two
    CAPACITY: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,  # at most C
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write the candidates of each image in the order of their keys, descending; grid (row blocks, B).

    A candidate's rank is the number of greater keys: no two keys are equal.
    """
    image = tl.program_id(1)
    first_row = tl.program_id(0) * ROWS
    count = _usable_count(counts_ptr, image, MAX_CANDIDATES)
    if first_row < count:
        image_keys_ptr = keys_ptr + image * CAPACITY
        rows = first_row + tl.arange(0, ROWS)
        used = rows < count
        keys = tl.load(image_keys_ptr + rows, mask=used, other=0)
        ranks = tl.zeros([ROWS], tl.int32)
        first_column = 0
        while first_column < count:  # no range: the interpreter of Triton 3.6 takes no bound from a tensor
            columns = first_column + tl.arange(0, CHUNK)
            others = tl.load(image_keys_ptr + columns, mask=columns < count, other=0)
            ranks += tl.sum((others[None, :] > keys[:, None]).to(tl.int32), axis=1)
            first_column += CHUNK

        flat_ids = (keys & ID_BITS).to(tl.int32) ^ ID_BITS
        scores = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(scores_ptr + image * CAPACITY + ranks, scores, mask=used)
        tl.store(class_ids_ptr + image * CAPACITY + ranks, flat_ids % K, mask=used)

        anchors = flat_ids // K
        on_32 = used & (anchors >= LEVELS[2][0])
        on_16 = used & (anchors >= LEVELS[1][0]) & (anchors < LEVELS[2][0])
        on_8 = used & (anchors < LEVELS[1][0])
        for side in tl.static_range(4):
            bins_8 = _load_bins(
                distance_logits_8_ptr, anchors, on_8, image, side, LEVELS, 0, BIN_COUNT, PADDED_BINS
            )
            bins_16 = _load_bins(
                distance_logits_16_ptr, anchors, on_16, image, side, LEVELS, 1, BIN_COUNT, PADDED_BINS
            )
            bins_32 = _load_bins(
                distance_logits_32_ptr, anchors, on_32, image, side, LEVELS, 2, BIN_COUNT, PADDED_BINS
            )
            logits = tl.where(on_8[:, None], bins_8, tl.where(on_16[:, None], bins_16, bins_32))
            exponentials = _exp(logits - tl.max(logits, axis=1)[:, None])
            totals = tl.sum(exponentials, axis=1)
            bins = tl.arange(0, PADDED_BINS).to(tl.float32)
            probabilities = tl.div_rn(exponentials, tl.broadcast_to(totals[:, None], [ROWS, PADDED_BINS]))
            expected = tl.sum(probabilities * bins[None, :], axis=1)

            points_8, pixels_8 = _point(anchors, side, LEVELS, 0)
            points_16, pixels_16 = _point(anchors, side, LEVELS, 1)
            points_32, pixels_32 = _point(anchors, side, LEVELS, 2)
            points = tl.where(on_8, points_8, tl.where(on_16, points_16, points_32))
            distances = expected * tl.where(on_8, pixels_8, tl.where(on_16, pixels_16, pixels_32))
            # Sides are left, top, right, bottom; box coordinates x1, y1, x2, y2.
            coordinates = points - distances if side < 2 else points + distances
            tl.store(boxes_ptr + (image * 4 + side) * CAPACITY + ranks, coordinates, mask=used)


@triton.jit
def _load_bins(
    logits_ptr,
    anchors,
    on_level,
    image,
    side: tl.constexpr,
    LEVELS: tl.constexpr,
    LEVEL: tl.constexpr,
    BIN_COUNT: tl.constexpr,
    PADDED_BINS: tl.constexpr,
):
    """(rows, bins) logits of one side; -inf for padding, which the softmax ignores."""
    cells = anchors - LEVELS[LEVEL][0]
    bins = tl.arange(0, PADDED_BINS)
    places = cells // LEVELS[LEVEL][2] * LEVELS[LEVEL][6] + cells % LEVELS[LEVEL][2] * LEVELS[LEVEL][7]
    channels = side * BIN_COUNT + bins
    logits_ptr += image.to(tl.int64) * LEVELS[LEVEL][4]
    logits = tl.load(
        logits_ptr + places[:, None] + channels[None, :] * LEVELS[LEVEL][5],
        mask=on_level[:, None] & (bins < BIN_COUNT)[None, :],
        other=0.0,
    ).to(tl.float32)
    return tl.where((bins < BIN_COUNT)[None, :], logits, -float("inf"))


@triton.jit
def _point(anchors, side: tl.constexpr, LEVELS: tl.constexpr, LEVEL: tl.constexpr):
    """x (sides 0 and 2) or y of the anchor point and the size of a cell, both in pixels."""
    cells = anchors - LEVELS[LEVEL][0]
    steps = cells % LEVELS[LEVEL][2] if side % 2 == 0 else cells // LEVELS[LEVEL][2]
    return (steps * LEVELS[LEVEL][3]).to(tl.float32), LEVELS[LEVEL][3] * 1.0


@triton.jit
def find_suppressors(
    boxes_ptr,  # B, 4, C float32
    class_ids_ptr,  # B, C int32
    counts_ptr,  # B int32
    control_floats_ptr,
    control_words_ptr,
    suppressors_ptr,  # B, C, C / 32 int32
    CAPACITY: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,  # at most C
    CONTROL_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """For each box the better boxes that would suppress it; grid (row blocks, column blocks, B).

    Bit i % 32 of word i // 32 in row j is 1 if box i would suppress box j, for i < j. Words without such an i
    may keep earlier contents.
    """
    image = tl.program_id(2)
    first_row = tl.program_id(0) * ROWS
    first_column = tl.program_id(1) * COLUMNS
    count = _usable_count(counts_ptr, image, MAX_CANDIDATES)
    if (first_row < count) & (first_column < first_row + ROWS):
        rows = first_row + tl.arange(0, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        image_boxes_ptr = boxes_ptr + image * 4 * CAPACITY
        x1, y1, x2, y2 = _load_boxes(image_boxes_ptr, rows, count, CAPACITY)
        better_x1, better_y1, better_x2, better_y2 = _load_boxes(image_boxes_ptr, columns, count, CAPACITY)
        area = (x2 - x1) * (y2 - y1)
        better_area = (better_x2 - better_x1) * (better_y2 - better_y1)
        # A box that is not finite gives an IoU of 0 or NaN, above no threshold, however NaN is handled here.
        width = tl.minimum(better_x2[None, :], x2[:, None]) - tl.maximum(better_x1[None, :], x1[:, None])
        height = tl.minimum(better_y2[None, :], y2[:, None]) - tl.maximum(better_y1[None, :], y1[:, None])
        intersection = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
        union = better_area[None, :] + area[:, None] - intersection
        threshold = tl.load(control_floats_ptr + image * CONTROL_WIDTH + IOU_THRESHOLD)

        class_ids = tl.load(class_ids_ptr + image * CAPACITY + rows, mask=rows < count, other=0)
        better_ids = tl.load(class_ids_ptr + image * CAPACITY + columns, mask=columns < count, other=0)
        agnostic = tl.load(control_words_ptr + image * CONTROL_WIDTH + AGNOSTIC) == 1
        rivals = (better_ids[None, :] == class_ids[:, None]) | agnostic
        # A product saves most tiles the division: what exceeds the threshold exceeds a slightly lower one.
        near = intersection > threshold * LOWERED * union
        suppresses = (near & rivals & (columns[None, :] < rows[:, None])).to(tl.int32)
        if tl.max(tl.max(suppresses, axis=1), axis=0) > 0:
            suppresses &= (tl.div_rn(intersection, union) > threshold).to(tl.int32)

        words = first_column // 32 + tl.arange(0, COLUMNS // 32)
        tl.store(
            suppressors_ptr + (image * CAPACITY + rows)[:, None] * (CAPACITY // 32) + words[None, :],
            _pack(tl.reshape(suppresses, [ROWS, COLUMNS // 32, 32]), axis=2),
            mask=(rows < count)[:, None] & (words < CAPACITY // 32)[None, :],
        )


@triton.jit
def resolve_and_write(
    boxes_ptr,  # B, 4, C float32
    scores_ptr,  # B, C float32
    class_ids_ptr,  # B, C int32
    counts_ptr,  # B int32
    control_floats_ptr,
    control_words_ptr,
    suppressors_ptr,  # B, C, C / 32 int32
    result_ptr,  # B, 1 + MAX_KEPT, RESULT_COLUMNS float32
    CAPACITY: tl.constexpr,
    MAX_CANDIDATES: tl.constexpr,  # at most C
    CONTROL_WIDTH: tl.constexpr,
    MAX_KEPT: tl.constexpr,
):
    """Greedy NMS as a fixed point, and the best boxes that stay, scaled to the original image; grid (B,).

    "A box stays if no better one that stays suppresses it": after t rounds the first t boxes are final, and
    the number of rounds is the length of the longest chain of suppressions, in practice a few.
    """
    image = tl.program_id(0)
    count = _usable_count(counts_ptr, image, MAX_CANDIDATES)
    WORDS: tl.constexpr = CAPACITY // 32
    rows = tl.arange(0, CAPACITY)
    words = tl.arange(0, WORDS)
    x1, y1, x2, y2 = _load_boxes(boxes_ptr + image * 4 * CAPACITY, rows, count, CAPACITY)
    candidates = (rows < count) & _is_finite(x1) & _is_finite(y1) & _is_finite(x2) & _is_finite(y2)
    suppressors_ptrs = suppressors_ptr + (image * CAPACITY + rows)[:, None] * WORDS + words[None, :]
    used = (rows < count)[:, None]
    written = words[None, :] * 32 < rows[:, None]

    stays = candidates.to(tl.int32)
    changes = 1
    while changes > 0:
        staying = _pack(tl.reshape(stays, [WORDS, 32]), axis=1)
        # A mask that is constant along a row keeps the loads wide.
        suppressors = tl.load(suppressors_ptrs, mask=used, other=0) & staying[None, :]
        suppressed = tl.max((written & (suppressors != 0)).to(tl.int32), axis=1)
        settled = (candidates & (suppressed == 0)).to(tl.int32)
        changes = tl.sum((settled != stays).to(tl.int32), axis=0)
        stays = settled

    floats_ptr = control_floats_ptr + image * CONTROL_WIDTH
    limit = tl.load(control_words_ptr + image * CONTROL_WIDTH + LIMIT)
    places = tl.cumsum(stays, axis=0) - stays
    returned = tl.minimum(tl.sum(stays, axis=0), limit)
    overflowed = (tl.load(counts_ptr + image) > MAX_CANDIDATES) | (returned > MAX_KEPT)

    header_ptr = result_ptr + image * (1 + MAX_KEPT) * RESULT_COLUMNS
    tl.store(header_ptr + RETURNED, returned.to(tl.float32))
    tl.store(header_ptr + OVERFLOWED, overflowed.to(tl.float32))
    row_ptrs = header_ptr + (1 + places) * RESULT_COLUMNS
    wanted = (stays == 1) & (places < tl.minimum(limit, MAX_KEPT))
    scale_x = tl.load(floats_ptr + SCALE_X)
    scale_y = tl.load(floats_ptr + SCALE_Y)
    scores = tl.load(scores_ptr + image * CAPACITY + rows, mask=wanted, other=0.0)
    class_ids = tl.load(class_ids_ptr + image * CAPACITY + rows, mask=wanted, other=0)
    tl.store(row_ptrs, x1 * scale_x, mask=wanted)
    tl.store(row_ptrs + 1, y1 * scale_y, mask=wanted)
    tl.store(row_ptrs + 2, x2 * scale_x, mask=wanted)
    tl.store(row_ptrs + 3, y2 * scale_y, mask=wanted)
    tl.store(row_ptrs + 4, scores, mask=wanted)
    tl.store(row_ptrs + 5, class_ids.to(tl.float32), mask=wanted)


@triton.jit
def _exp(x):
    """The exponential of torch; with the faster tl.exp a score could cross its threshold."""
    if INTERPRETED:  # which has no libdevice
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def _usable_count(counts_ptr, image, MAX_CANDIDATES: tl.constexpr):
    """The number of candidates of an image; 0 if there are too many."""
    count = tl.load(counts_ptr + image)
    return tl.where(count > MAX_CANDIDATES, 0, count)


@triton.jit
def _load_boxes(boxes_ptr, rows, count, CAPACITY: tl.constexpr):
    used = rows < count
    x1 = tl.load(boxes_ptr + rows, mask=used, other=0.0)
    y1 = tl.load(boxes_ptr + CAPACITY + rows, mask=used, other=0.0)
    x2 = tl.load(boxes_ptr + 2 * CAPACITY + rows, mask=used, other=0.0)
    y2 = tl.load(boxes_ptr + 3 * CAPACITY + rows, mask=used, other=0.0)
    return x1, y1, x2, y2


@triton.jit
def _is_finite(values):
    return tl.abs(values) < float("inf")  # NaN is not


@triton.jit
def _pack(flags, axis: tl.constexpr):
    """Words of 32 flags of 0 or 1 along the last axis; their sum is their union, as no two share a bit."""
    shifts = tl.arange(0, 32)
    return tl.sum(flags << (shifts[None, None, :] if axis == 2 else shifts[None, :]), axis=axis)
