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
    for (int rows = 1; rows <= 3 * kRowBlock + 1; rows++)
        for (int pairs : {1, 8, 16, 17, 32}) check_multiply<false>(rows, pairs), check_multiply<true>(rows, pairs);
    for (int pairs : {2, 15, 16, 48, 288}) check_multiply<false>(5, pairs), check_multiply<true>(5, pairs);
}

static std::vector<float> widened(const std::vector<bf16>& x) {
    std::vector<float> wide(x.size());
    std::transform(x.begin(), x.end(), wide.begin(), to_float);
    return wide;
}

template <bool add>
static void check_widened(int rows, int pairs) {
    Random random(rows * 1000 + pairs);
    const size_t x_stride = 2 * pairs + 6, y_stride = kTile + 5;
    const auto x = random_bf16(random, rows * x_stride), tile = random_bf16(random, (size_t)pairs * 2 * kTile);
    const auto before = random_floats(random, rows * y_stride), wide = widened(x);
    Fenced<float> found(before.size()), wanted(before.size());
    std::copy(before.begin(), before.end(), found.data()), std::copy(before.begin(), before.end(), wanted.data());
    multiply<add>(Rows{x.data(), x_stride, wide.data()}, rows, tile.data(), pairs, found.data(), y_stride);
    multiply<add>(Rows{x.data(), x_stride}, rows, tile.data(), pairs, wanted.data(), y_stride);
    found.check("multiply");
    expect(!memcmp(found.data(), wanted.data(), before.size() * sizeof(float)), "%d rows, %d pairs", rows, pairs);
}

TEST(widened_rows_have_the_same_products) {
    for (int rows = 1; rows <= 2 * std::max(kWideBlock, kRowBlock) + 1; rows++)
        for (int pairs : {1, 8, 17, 288}) check_widened<false>(rows, pairs), check_widened<true>(rows, pairs);
}

TEST(rows_are_widened_once_in_a_phase) {
    constexpr int kDepth = 32, kRows = 8;
    Random random(1);
    auto x = random_bf16(random, 3 * kRows * kDepth);
    const bool widens = kWideBlock > 0;
    WideRows of;
    auto check = [&](int start, const std::vector<bf16>& wanted) {
        const Rows found = of.rows(x.data(), kDepth, start, kRows);
        expect(found.x == &x[start * kDepth] && found.stride == kDepth, "rows from %d on lie elsewhere", start);
        expect((found.wide != nullptr) == widens, "rows from %d on are widened or not", start);
        for (int i = 0; widens && i < kRows * kDepth; i++)
            expect(found.wide[i] == to_float(wanted[start * kDepth + i]), "number %d from row %d on", i, start);
    };
    of.begin(kMinWideTiles);
    const auto first = x;
    check(0, first);
    std::fill(x.begin(), x.end(), 0);
    const auto second = x;
    check(2 * kRows, second);  // a piece that wasn't met yet, for which there was no room
    check(0, first);
    check(kRows, second);
    check(0, first), check(2 * kRows, second);
    of.begin(kMinWideTiles);
    check(0, second);
    expect(of.rows(x.data(), kDepth, 0, kMinWideRows - 1).wide == nullptr, "so few rows are widened");
    expect(of.rows(x.data(), kDepth, (int)(kMaxWide / kDepth) - kRows + 1, kRows).wide == nullptr, "so many are kept");
    of.begin(kMinWideTiles - 1);
    expect(of.rows(x.data(), kDepth, 0, kRows).wide == nullptr, "rows are widened for so few tiles");
}
