// Dropout's masks: the features of A's input that are kept.
//
// A mask is a function of the token's key, the group's place among all groups, and the feature. So masks don't depend
// on threads, on the other tokens or on the processor, and server/training/dropout.py computes the same ones in torch.
//
// A hash of 32 bits decides two features: its lower half a feature of the first half of the input, its upper half the
// same feature of the second half. A feature is dropped if its 16 bits, read as a signed number, are among the lowest
// `num_dropped` of 65,536 numbers. The hash multiplies a Weyl sequence twice, and folds its upper half into the lower
// one before, between and after. Half of the key starts the sequence; the other half is added within the hash, so that
// two tokens whose sequences overlap still have different hashes.
#pragma once
#include "numbers.h"

inline U32x16 fold_halves(U32x16 x) { return x ^ (x >> 16); }

// kept (tokens, in / 16): bit i of a number is set if dropout keeps the feature i of its 16. `in` is a multiple of 32.
inline void draw_kept(const uint64_t* keys, int64_t place, int64_t num_dropped, int64_t in, int start, int rows,
                      uint16_t* kept) {
    const U32x16 step = broadcast_u32(kDropoutStep);
    const U32x16 first_multiplier = broadcast_u32(kDropoutFirst), second_multiplier = broadcast_u32(kDropoutSecond);
    const U32x16 threshold = broadcast_u32(static_cast<uint32_t>((num_dropped << 16) - (int64_t{1} << 31)));
    const U32x16 stride = broadcast_u32(16) * step;
    const U32x16 first = (lane_numbers() + broadcast_u32(static_cast<uint32_t>(place << 16))) * step;
    for (int row = start; row < start + rows; row++) {
        const U32x16 key = broadcast_u32(static_cast<uint32_t>(keys[row] >> 32));
        U32x16 weyl = first + broadcast_u32(static_cast<uint32_t>(keys[row]));
        uint16_t *lower = kept + row * (in / 16), *upper = lower + in / 32;
        for (int64_t i = 0; i < in / 32; i++, weyl = weyl + stride) {
            const U32x16 mixed = fold_halves((fold_halves(weyl) + key) * first_multiplier);
            const U32x16 hash = fold_halves(mixed * second_multiplier);
            lower[i] = static_cast<uint16_t>(~is_less(hash << 16, threshold));
            upper[i] = static_cast<uint16_t>(~is_less(hash, threshold));
        }
    }
}

// y (tokens, in) = x · factor if the feature is kept, else 0.
inline void keep(const uint16_t* kept, double factor, const bf16* x, int64_t in, int start, int rows, bf16* y) {
    const F32x16 factors = broadcast(static_cast<float>(factor));
    for (int64_t i = start * in; i < (start + rows) * in; i += 16)
        store_bf16(y + i, choose(kept[i / 16], load_bf16(x + i) * factors, F32x16{}));
}
