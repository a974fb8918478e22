#include "kernels/loss.h"

#include "check.h"

// `certainty`: how much of a target's row of the head its hidden state is, which is random where it is 0.
static void check_loss(int rows, int vocab, int hidden, int threads, double certainty = 0) {
    Random random(rows * 1000 + vocab + hidden);
    const auto head = random_bf16(random, (size_t)vocab * hidden);
    auto x = random_bf16(random, (size_t)rows * hidden);
    std::vector<int64_t> targets(rows);
    for (auto& target : targets) target = random.below(vocab);
    targets[0] = vocab - 1, targets[rows - 1] = 0;
    for (int i = 0; certainty != 0 && i < rows * hidden; i++)
        x[i] = to_bf16((float)certainty * to_float(head[targets[i / hidden] * hidden + i % hidden]));
    const double factor = 0.37;
    std::vector<bf16> first;
    std::vector<int64_t> first_likeliest;
    std::vector<float> first_d_head;
    std::vector<double> d_head((size_t)vocab * hidden, 0.5), d_head_error((size_t)vocab * hidden, kU32);
    double first_loss = 0;
    for (int size = 1; size <= threads; size++) {
        Team team(size);
        Loss loss(&team, head.data(), vocab, hidden);
        Fenced<bf16> d_hidden((size_t)rows * hidden);
        Fenced<float> d_head((size_t)vocab * hidden, 0.5f);  // which is added to
        const double found = loss.run(x.data(), targets.data(), rows, factor, d_hidden.data(), d_head.data());
        d_hidden.check("the gradient"), d_head.check("the head's gradient");
        std::vector<double> losses((size_t)rows);
        std::vector<int64_t> likeliest((size_t)rows);
        loss.measure(x.data(), targets.data(), rows, losses.data(), likeliest.data());
        double sum = 0;
        for (double of : losses) sum += of;
        expect(sum == found, "without gradients the loss is another");
        if (size > 1)
            expect(likeliest == first_likeliest, "%d threads find something else likely", size);
        else
            first_likeliest = likeliest;
        if (size == 1) {
            first.assign(d_hidden.data(), d_hidden.data() + rows * hidden), first_loss = found;
            first_d_head.assign(d_head.data(), d_head.data() + vocab * hidden);
            continue;
        }
        expect(!memcmp(first_d_head.data(), d_head.data(), first_d_head.size() * sizeof(float)),
               "%d threads compute another gradient of the head", size);
        expect(found == first_loss && !memcmp(first.data(), d_hidden.data(), first.size() * sizeof(bf16)),
               "%d threads compute something else", size);
    }

    double exact_loss = 0, loss_error = 0;
    for (int row = 0; row < rows; row++) {
        std::vector<double> p(vocab);
        double most = -INFINITY, size = 0, sum = 0;
        for (int token = 0; token < vocab; token++) {
            double magnitude = 0;
            for (int i = 0; i < hidden; i++) {
                const double product = (double)to_float(x[row * hidden + i]) * to_float(head[token * hidden + i]);
                p[token] += product, magnitude += std::abs(product);
            }
            most = std::max(most, p[token]), size = std::max(size, magnitude);
        }
        const double logit = p[targets[row]];
        expect(p[first_likeliest[row]] >= most - 2 * sum_error(hidden) * size, "row %d: %ld is the likeliest", row,
               first_likeliest[row]);
        for (double of : p) sum += std::exp(of - most);
        const double divisor = most + std::log(sum);
        // Of a logit, of the logarithm of the sum of their powers, and of both roundings to fp32.
        const double logit_error = sum_error(hidden) * size;
        const double divisor_error = logit_error + kExp + sum_error(4) + 2 * kU32 * std::abs(divisor);
        exact_loss += divisor - logit;
        loss_error += logit_error + divisor_error + kU32 * std::abs(divisor - logit);
        std::vector<double> error(vocab);
        for (int token = 0; token < vocab; token++) {
            p[token] = std::exp(p[token] - divisor);
            error[token] = p[token] * (logit_error + divisor_error + 2 * kU32 * (std::abs(divisor) + size) + kExp);
            if (token == targets[row]) p[token] -= 1, error[token] += kU32;
            p[token] *= factor, error[token] = factor * (error[token] + 2 * kU32 * std::abs(p[token] / factor));
            error[token] += kU16 * (std::abs(p[token]) + error[token]);
        }
        for (int i = 0; i < vocab * hidden; i++) {
            const int token = i / hidden;
            const double of = to_float(x[row * hidden + i % hidden]);
            d_head[i] += p[token] * of;
            d_head_error[i] +=
                (error[token] + sum_error(rows + 2) * (std::abs(p[token]) + error[token])) * std::abs(of);
        }
        for (int i = 0; i < hidden; i++) {
            double exact = 0, bound = 0;
            for (int token = 0; token < vocab; token++) {
                const double weight = to_float(head[token * hidden + i]);
                exact += p[token] * weight;
                bound += (error[token] + sum_error(vocab + 16) * std::abs(p[token])) * std::abs(weight);
            }
            expect_near(to_float(first[row * hidden + i]), exact, bound + kU16 * (std::abs(exact) + bound),
                        "%d rows, vocabulary of %d: (%d, %d)", rows, vocab, row, i);
        }
    }
    for (int i = 0; i < vocab * hidden; i++)
        expect_near(first_d_head[i], d_head[i], d_head_error[i] + sum_error(rows + 2) * std::abs(d_head[i]),
                    "%d rows, vocabulary of %d: the head's (%d, %d)", rows, vocab, i / hidden, i % hidden);
    expect_near(first_loss, exact_loss, loss_error, "the loss of %d rows, vocabulary of %d", rows, vocab);
}

TEST(loss_and_its_gradient) {
    for (int rows : {1, 2, 15, 16, 17}) check_loss(rows, 96, 32, 3);
    for (int vocab : {32, 64, 512, 544, 1056}) check_loss(5, vocab, 64, 3);  // parts and groups of tiles, and less
    check_loss(9, 8320, 96, 2);                                              // more tiles in a part than go at once
    for (double certainty : {0.3, 0.7, 2.0})
        check_loss(5, 8320, 64, 2, certainty);  // the greatest logit comes last, first
    for (int rows : {kLossRows - 1, kLossRows, kLossRows + 1}) check_loss(rows, 64, 32, 2);
}

TEST(the_first_of_equally_likely_tokens) {
    const int vocab = 1056, hidden = 32;
    Random random(3);
    std::vector<bf16> head((size_t)vocab * hidden);
    const auto row = random_bf16(random, hidden);
    for (int token : {700, 701, 900, 1055}) std::copy(row.begin(), row.end(), &head[token * hidden]);
    Team team(2);
    Loss loss(&team, head.data(), vocab, hidden);
    std::vector<bf16> x(row);
    x.resize(2 * hidden);  // a row of zeros, by which all are equally likely
    const int64_t targets[] = {900, 3};
    double losses[2];
    int64_t likeliest[2];
    loss.measure(x.data(), targets, 2, losses, likeliest);
    expect(likeliest[0] == 700 && likeliest[1] == 0, "%ld and %ld", likeliest[0], likeliest[1]);
    expect_near(losses[1], std::log(vocab), 1e-6, "all are equally likely");
}

TEST(loss_of_nothing) {
    Team team(2);
    const std::vector<bf16> head(32 * 32);
    Loss loss(&team, head.data(), 32, 32);
    loss.measure(nullptr, nullptr, 0, nullptr, nullptr);
    expect(loss.run(nullptr, nullptr, 0, 1, nullptr, nullptr) == 0, "no rows have a loss");
}
