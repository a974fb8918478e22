#include "stored.h"

namespace {

Matrix packed(const BaseTensor& tensor, int out, int in) {
    Matrix matrix;
    matrix.reserve((WeightType)tensor.type, out, in);
    for (int tile = 0; tile < out / kTile; tile++) matrix.pack(tensor, tile);
    return matrix;
}

// The same bits, but for the sign of zeros on processors that don't keep it.
bool are_expanded_to(const bf16* found, const bf16* wanted, int count) {
    return std::equal(found, found + count, wanted,
                      [](bf16 x, bf16 y) { return x == y || (!simd::kKeepsSignOfZero && x == 0 && y == 0x8000); });
}

}  // namespace

TEST(weights_are_packed_in_tiles) {
    Random random(1);
    for (int in : {32, 64, 160}) {
        const int out = 96;
        const auto w = random_bf16(random, (size_t)out * in);
        const Matrix matrix = packed({w.data(), kBf16, nullptr}, out, in);
        expect(matrix.in() == in, "%d inputs", matrix.in());
        ExpandedTile unused;
        for (int row = 0; row < out; row++)
            for (int i = 0; i < in; i++) {
                const bf16 found = matrix.tile(row / kTile, unused)[i / 2 * 2 * kTile + row % kTile * 2 + i % 2];
                expect(found == w[row * in + i], "row %d, input %d of %d", row, i, in);
            }
        expect(unused.size == 0, "room for what isn't expanded");
    }
}

TEST(stored_weights_expand_to_the_same_bits) {
    Random random(2);
    ExpandedTile scratch;
    for (WeightType type : {kQ4_1, kQ8_0})
        for (int in : {32, 96, 1056}) {  // the last is more than there was room for
            const int out = 64;
            const Stored stored(random, type, out * in), tame(random, type, out * in, 0.01);
            for (const Stored& of : {stored, tame}) {
                const Matrix matrix = packed(of.tensor(), out, in);
                const Matrix expanded = packed({of.values.data(), kBf16, nullptr}, out, in);
                ExpandedTile unused;
                for (int tile : {0, 1, 1, 0})
                    expect(are_expanded_to(matrix.tile(tile, scratch), expanded.tile(tile, unused), in * kTile),
                           "type %d, %d inputs, tile %d", type, in, tile);
                for (int rows = 1; rows <= kStoredRows + 2; rows++) {
                    const auto x = random_bf16(random, (size_t)rows * in);
                    PrefetchList nothing, something;
                    something.add(x.data(), 100 * (size_t)rows);
                    std::vector<float> found(rows * kTile), wanted(rows * kTile);
                    matrix.multiply({x.data(), (size_t)in}, rows, 1, found.data(), kTile, scratch, nothing);
                    expanded.multiply({x.data(), (size_t)in}, rows, 1, wanted.data(), kTile, unused, something);
                    expect(found == wanted, "type %d, %d inputs: another product of %d rows", type, in, rows);
                }
            }
        }
}

TEST(scaled_weights_are_rounded_to_16_bits) {
    const std::vector<uint16_t> ones(16, 0x3c00);
    for (uint32_t first = 0; first < 1u << 24; first += 32) {  // each sign and significand
        float x[32];
        for (uint32_t i = 0; i < 32; i++) {
            const uint32_t exponent = 103 + first / 32 % 60, at = first + i;
            const uint32_t bits = at >> 23 << 31 | exponent << 23 | (at & 0x7fffff);
            memcpy(&x[i], &bits, 4);
        }
        const F32x16 one = load(x), other = load(x + 16);
        bf16 found[32], wanted[32];
        store(found, simd::packed(simd::scaled({one, other}, simd::load_scales(ones.data()))));
        store_bf16(wanted, one), store_bf16(wanted + 16, other);
        std::sort(found, found + 32), std::sort(wanted, wanted + 32);  // each processor has its order
        expect(std::equal(found, found + 32, wanted), "significands from %x on", first);
    }
}
