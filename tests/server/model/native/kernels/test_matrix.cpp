#include "check.h"
#include "kernels/matrix.h"

template <bool add>
static void check_multiply(int rows, int pairs) {
    Random random(rows * 1000 + pairs);
    const int in = 2 * pairs, x_stride = in + 6, y_stride = kTile + 5;
    const auto x = random_bf16(random, (size_t)rows * x_stride);
    const auto w = random_bf16(random, (size_t)kTile * in);
    std::vector<bf16> tile(w.size());
    for (int row = 0; row < kTile; row++)
        for (int i = 0; i < in; i++) tile[i / 2 * 2 * kTile + row * 2 + i % 2] = w[row * in + i];
    const auto before = random_floats(random, (size_t)rows * y_stride);
    Fenced<float> y(before.size());
    std::copy(before.begin(), before.end(), y.data());
    multiply<add>(x.data(), x_stride, rows, tile.data(), pairs, y.data(), y_stride);
    y.check("multiply");
    for (int row = 0; row < rows; row++) {
        for (int column = 0; column < y_stride; column++) {
            const float found = y[row * y_stride + column], was = before[row * y_stride + column];
            if (column >= kTile) {
                expect(found == was, "column %d is written", column);
                continue;
            }
            double exact = add ? was : 0, size = std::abs(exact);
            for (int i = 0; i < in; i++) {
                const double product = (double)to_float(x[row * x_stride + i]) * to_float(w[column * in + i]);
                exact += product, size += std::abs(product);
            }
            expect_near(found, exact, sum_error(2 * pairs + 1) * size, "%d rows, %d pairs: (%d, %d)", rows, pairs, row,
                        column);
        }
        std::vector<float> alone(&before[row * y_stride], &before[row * y_stride] + kTile);
        multiply<add>(&x[row * x_stride], x_stride, 1, tile.data(), pairs, alone.data(), kTile);
        expect(!memcmp(alone.data(), &y[row * y_stride], kTile * sizeof(float)), "row %d of %d is another one alone",
               row, rows);
    }
}

TEST(multiply_rows_by_a_tile) {
    for (int rows = 1; rows <= 3 * kBlock + 1; rows++)
        for (int pairs : {1, 8, 16, 17, 32}) check_multiply<false>(rows, pairs), check_multiply<true>(rows, pairs);
    for (int pairs : {2, 15, 16, 48, 288}) check_multiply<false>(5, pairs), check_multiply<true>(5, pairs);
}
