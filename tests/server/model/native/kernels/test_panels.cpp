#include "check.h"
#include "kernels/panels.h"

TEST(transpose16_turns_over) {
    uint32_t x[16][16], y[16][16];
    for (uint32_t i = 0; i < 16; i++)
        for (uint32_t k = 0; k < 16; k++) x[i][k] = i << 8 | k;
    U32x16 r[16];
    for (int i = 0; i < 16; i++) r[i] = load_u32(x[i]);
    transpose16(r);
    for (int i = 0; i < 16; i++) store(y[i], r[i]);
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++) expect(y[i][k] == x[k][i], "(%d, %d) is %x", i, k, y[i][k]);
}

// Of output `output` and input `i` in a packed tile.
static bf16 packed(Fenced<uint32_t>& panel, int output, int i) {
    return (bf16)(panel[i / 2 * kTile + output] >> (i % 2 * 16));
}

TEST(pack_rows_into_a_tile) {
    Random random(1);
    for (int outputs : {1, 15, 16, 17, 31, 32})
        for (int depth : {2, 14, 30, 32, 34, 64, 66, 96}) {
            const int stride = depth + 6;
            // No more than the last row's numbers lie behind it.
            const auto w = random_bf16(random, (size_t)(outputs - 1) * stride + depth);
            Fenced<uint32_t> panel((size_t)depth / 2 * kTile);
            pack_rows(w.data(), stride, outputs, depth, panel.data());
            panel.check("pack_rows");
            for (int output = 0; output < kTile; output++)
                for (int i = 0; i < depth; i++)
                    expect(packed(panel, output, i) == (output < outputs ? w[output * stride + i] : 0),
                           "%d outputs, depth %d: (%d, %d)", outputs, depth, output, i);
        }
}

TEST(pack_columns_into_a_tile) {
    Random random(2);
    for (int depth : {1, 2, 3, 15, 16, 17, 32, 33, 100}) {
        const int stride = 2 * kTile;
        const auto w = random_bf16(random, (size_t)(depth - 1) * stride + kTile);
        Fenced<uint32_t> panel((size_t)(depth + 1) / 2 * kTile);
        pack_columns(w.data(), stride, depth, panel.data());
        panel.check("pack_columns");
        for (int output = 0; output < kTile; output++)
            for (int i = 0; i < (depth + 1) / 2 * 2; i++)
                expect(packed(panel, output, i) == (i < depth ? w[i * stride + output] : 0), "depth %d: (%d, %d)",
                       depth, output, i);
    }
}

TEST(transpose_turns_over) {
    Random random(3);
    for (int rows : {1, 2, 15, 16, 17, 31, 32, 33, 63, 65})
        for (int columns : {16, 32, 48}) {
            const int stride = columns + 16, even = (rows + 1) / 2 * 2, to_stride = even + 3;
            const auto from = random_bf16(random, (size_t)(rows - 1) * stride + columns);
            Fenced<bf16> to((size_t)columns * to_stride);
            transpose(from.data(), stride, rows, columns, to.data(), to_stride);
            to.check("transpose");
            for (int column = 0; column < columns; column++)
                for (int row = 0; row < to_stride; row++)
                    expect(to[column * to_stride + row] == (row < rows   ? from[row * stride + column]
                                                            : row < even ? 0
                                                                         : 77),
                           "%d rows of %d: (%d, %d)", rows, columns, row, column);
        }
}

TEST(multiply_by_a_panel) {
    Random random(4);
    const int rows = 13, in = 34;
    const auto x = random_bf16(random, rows * in), w = random_bf16(random, kTile * in);
    std::vector<uint32_t> panel(in / 2 * kTile);
    pack_rows(w.data(), in, kTile, in, panel.data());
    std::vector<float> y(rows * kTile);
    multiply(x.data(), in, rows, panel.data(), in / 2, y.data(), kTile);
    for (int row = 0; row < rows; row++)
        for (int output = 0; output < kTile; output++) {
            double exact = 0, size = 0;
            for (int i = 0; i < in; i++) {
                const double product = (double)to_float(x[row * in + i]) * to_float(w[output * in + i]);
                exact += product, size += std::abs(product);
            }
            expect_near(y[row * kTile + output], exact, sum_error(in) * size, "(%d, %d)", row, output);
        }
}

// Of an odd number of pairs, which no processor multiplies by AMX.
TEST(half_a_tile_and_a_tile_with_something_fetched) {
    Random random(5);
    const int in = 34;
    const auto w = random_bf16(random, kTile * in);
    std::vector<uint32_t> panel(in / 2 * kTile);
    pack_rows(w.data(), in, kTile, in, panel.data());
    Fenced<uint32_t> half(panel.size());
    pack_rows(w.data(), in, 16, in, half.data(), 16);
    half.check("pack_rows");
    for (int pair = 0; pair < in / 2; pair++)
        for (int output = 0; output < kTile; output++)
            expect(half[pair * kTile + output] == (output < 16 ? panel[pair * kTile + output] : 77), "pair %d: %d",
                   pair, output);
    for (int rows : {1, kNarrowBlock - 1, kNarrowBlock, kNarrowBlock + 1, kPrefetchRows, 2 * kPrefetchRows + 1}) {
        const auto x = random_bf16(random, (size_t)rows * in);
        std::vector<float> whole((size_t)rows * kTile);
        multiply(x.data(), in, rows, panel.data(), in / 2, whole.data(), kTile);
        Fenced<float> narrow((size_t)rows * kTile), same((size_t)rows * kTile);
        multiply_narrow(x.data(), in, rows, half.data(), in / 2, narrow.data(), kTile);
        multiply_and_prefetch({x.data(), (size_t)in}, rows, panel.data(), in / 2, same.data(), kTile, w.data(), in,
                              kTile);
        narrow.check("multiply_narrow"), same.check("multiply_and_prefetch");
        for (int i = 0; i < rows * kTile; i++) {
            expect(narrow[i] == (i % kTile < 16 ? whole[i] : 77), "half of %d rows: %d", rows, i);
            expect(same[i] == whole[i], "%d rows: %d", rows, i);
        }
    }
}
