// The next token of a row of logits, and log-probabilities: what server/engine/sampling.py computes in torch, without a
// sort of more than what filters leave.
//
// A row's answer depends on the row alone: one thread computes it, and adds up in one order.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "numbers.h"

constexpr float kMaxNoise = 16.7f;  // more than the most that gumbel16 gives, -ln(-ln(1 - 2^-24)) = 16.636

// Standard Gumbel noise, -ln(-ln(u)), of 16 tokens. Token and key decide it: u is the 23 highest bits of a 32-bit mix
// of them, and a half (multipliers of "lowbias32", Wellons 2018).
inline F32x16 gumbel16(U32x16 tokens, int64_t key) {
    U32x16 x = tokens ^ broadcast_u32(key);
    x = x ^ (x >> 16);
    x = x * broadcast_u32(0x7feb352d);
    x = x ^ broadcast_u32(key >> 32);
    x = x ^ (x >> 15);
    x = x * broadcast_u32(0x846ca68b);
    x = x ^ (x >> 16);
    const F32x16 bits = to_f32(x >> 9), zero = F32x16{};
    const F32x16 u = (bits + broadcast(0.5f)) * broadcast(0x1p-23f);
    return zero - log16(zero - log16(u));
}

class RowSampler {  // of one thread
  public:
    // Chooses from `logits` (vocab), which are overwritten. logprobs (1 + max_top): the chosen token's and the
    // likeliest ones', whose ids are top_ids (max_top); where there are no more, the ids are -1.
    void run(const SampleStep& step, const SampleRow& row, float* logits, int64_t vocab, int64_t* token_id,
             float* logprobs, int64_t* top_ids) {
        logits_ = logits, vocab_ = (int)vocab, key_ = row.key;
        double divisor = 0;
        if (row.num_top) divisor = likeliest(row, logprobs + 1, top_ids);
        if (change(step, row) || !row.num_top) find_largest();  // which `likeliest` did before
        const bool is_number = !has_nan_ && std::isfinite(most_);
        if (is_number && row.temperature > 0) draw(row);
        *token_id = is_number ? chosen_ : -1;
        if (row.num_top && is_number) logprobs[0] = (float)((double)unchanged(chosen_) - divisor);
    }

  private:
    struct Candidate {
        float logit, weight;  // weight: e^x of its share x in the draw
        int token;
    };
    struct Original {
        int token;
        float logit;
    };
    // The order that filters go by: the likelier one, and the lower id of equals.
    static bool is_before(const Candidate& a, const Candidate& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
    }

    // The largest logit and the first token that has it; whether any is NaN.
    void find_largest() {
        F32x16 most = broadcast(-std::numeric_limits<float>::infinity());
        U32x16 at = broadcast_u32(0), tokens = lane_numbers();
        Mask16 nan = 0;
        for (int i = 0; i < vocab_; i += 16, tokens = tokens + broadcast_u32(16)) {
            const F32x16 l = load(logits_ + i);
            nan |= is_nan(l);
            const Mask16 is_more = is_greater(l, most);
            most = choose(is_more, l, most), at = choose(is_more, tokens, at);
        }
        has_nan_ = nan != 0, most_ = reduce_max(most);
        const Mask16 is_most = is_equal(most, broadcast(most_));
        chosen_ = reduce_min(is_most, at);
    }

    // x = (logit - the largest) / temperature: what a token brings to the draw, beside its noise.
    F32x16 shares(F32x16 logits) const { return (logits - broadcast(most_)) * broadcast(by_); }

    // The sum of e^x over the vocabulary: in fp32 over parts of it, whose sums are added up in doubles.
    double sum_weights() const {
        constexpr int kPart = 512;
        double sum = 0;
        for (int start = 0; start < vocab_; start += kPart) {
            F32x16 part{};
            for (int i = start; i < std::min(start + kPart, vocab_); i += 16)
                part = part + exp16(shares(load(logits_ + i)));
            sum += reduce_add(part);
        }
        return sum;
    }

    // Makes candidates of the tokens whose logits are `floor` at least, in their order; the sum of their weights.
    double collect(float floor) {
        candidates_.clear();
        double mass = 0;
        for (int i = 0; i < vocab_; i += 16) {
            const F32x16 l = load(logits_ + i);
            unsigned mask = is_at_least(l, broadcast(floor));
            if (!mask) continue;
            float weights[16];
            store(weights, exp16(shares(l)));
            for (; mask; mask &= mask - 1) {
                const int lane = std::countr_zero(mask);
                candidates_.push_back({logits_[i + lane], weights[lane], i + lane});
                mass += weights[lane];
            }
        }
        return mass;
    }

    // Makes candidates of the likeliest tokens: enough(their mass), or all that are finite.
    template <class Enough>
    void collect_until(Enough enough) {
        constexpr double kFirst = 4, kLast = 64;  // how far below the largest
        constexpr float kLeast = std::numeric_limits<float>::lowest();
        for (double below = kFirst; below <= kLast; below *= 2)
            if (enough(collect(std::max((float)(most_ - below / by_), kLeast)))) return;
        collect(kLeast);
    }

    // Leaves the `count` likeliest tokens.
    void keep_top(int64_t count) {
        collect_until([&](double) { return (int64_t)candidates_.size() >= count; });
        if ((int64_t)candidates_.size() <= count) return;
        std::nth_element(candidates_.begin(), candidates_.begin() + count, candidates_.end(), is_before);
        candidates_.resize(count);
    }

    // Leaves of the candidates the likeliest that have `missing` mass together: those before which there is less.
    void keep_mass(double missing) {
        constexpr int kFew = 16;
        auto begin = candidates_.begin(), end = candidates_.end();
        while (end - begin > kFew) {  // what comes before `begin` is kept, what comes from `end` on is not
            const auto middle = begin + (end - begin) / 2;
            std::nth_element(begin, middle, end, is_before);
            double mass = 0;
            for (auto one = begin; one < middle; one++) mass += one->weight;
            if (mass >= missing)
                end = middle;
            else
                missing -= mass, begin = middle;
        }
        std::sort(begin, end, is_before);
        for (; begin < end && missing > 0; begin++) missing -= begin->weight;
        candidates_.erase(begin, candidates_.end());
    }

    // Notes the likeliest tokens and their log-probabilities; the logarithm of the softmax's divisor.
    double likeliest(const SampleRow& row, float* logprobs, int64_t* top_ids) {
        find_largest();
        by_ = 1;
        const double divisor = most_ + std::log(sum_weights());
        keep_top(row.num_top);
        std::sort(candidates_.begin(), candidates_.end(), is_before);
        for (int64_t i = 0; i < row.num_top; i++) {
            const bool is_there = i < (int64_t)candidates_.size();
            top_ids[i] = is_there ? candidates_[i].token : -1;
            logprobs[i] = is_there ? (float)(candidates_[i].logit - divisor) : -INFINITY;
        }
        return divisor;
    }

    // Penalties and biases, and what a constraint forbids; whether there was any of it.
    bool change(const SampleStep& step, const SampleRow& row) {
        originals_.clear();
        auto note = [&](int64_t token) {
            if (row.num_top) originals_.push_back({(int)token, logits_[token]});
        };
        const auto penalty = (float)row.repetition_penalty;
        for (int64_t i = row.first_seen; i < row.first_seen + row.num_seen; i++) {
            float& logit = logits_[step.seen[i]];
            note(step.seen[i]);
            logit = logit < 0 ? logit * penalty : logit / penalty;
        }
        for (int64_t i = row.first_added; i < row.first_added + row.num_added; i++) {
            note(step.added_ids[i]);
            logits_[step.added_ids[i]] += (float)step.added[i];
        }
        if (row.forbidden == nullptr) return row.num_seen > 0 || row.num_added > 0;
        for (int i = 0; i < vocab_; i += 16) {
            const F32x16 never = broadcast(-std::numeric_limits<float>::infinity());
            store_lanes(logits_ + i, nonzero_bytes(row.forbidden + i), never);
        }
        return true;
    }
    // A token's logit before it was changed.
    float unchanged(int token) const {
        for (const Original& original : originals_)
            if (original.token == token) return original.logit;
        return logits_[token];
    }

    // Gumbel-max over what the filters leave, behind find_largest: the token with the highest x + noise.
    void draw(const SampleRow& row) {
        by_ = (float)(1 / row.temperature);
        least_ = row.min_p > 0 ? (float)std::log(row.min_p) : -std::numeric_limits<float>::infinity();
        score_ = -std::numeric_limits<float>::infinity();
        consider(broadcast(most_), broadcast_u32(chosen_), 1);  // no filter drops the likeliest
        const bool has_top_k = row.top_k > 0 && row.top_k < vocab_, has_top_p = row.top_p < 1;
        if (!has_top_k && !has_top_p) return draw_from_all();
        double all = 0;  // what top-p is a share of
        if (has_top_k) {
            keep_top(row.top_k);
            for (const Candidate& one : candidates_) all += one.weight;
        } else {
            all = sum_weights();
            collect_until([&](double mass) { return mass >= row.top_p * all; });
        }
        if (has_top_p) keep_mass(row.top_p * all);
        for (size_t start = 0; start < candidates_.size(); start += 16) {
            const int count = (int)std::min<size_t>(16, candidates_.size() - start);
            float logits[16] = {};
            int tokens[16] = {};
            for (int i = 0; i < count; i++)
                logits[i] = candidates_[start + i].logit, tokens[i] = candidates_[start + i].token;
            consider(load(logits), load_u32(tokens), first_lanes(count));
        }
    }

    // Without noise for those whom no noise would help.
    void draw_from_all() {
        auto floor = [&] {
            const double least = most_ + std::max((double)least_ * 1.01, (double)score_ - kMaxNoise) / by_;
            return std::max(std::nextafter((float)least, -INFINITY), std::numeric_limits<float>::lowest());
        };
        float now = floor(), score = score_;
        for (int i = 0; i < vocab_; i += 16) {
            const F32x16 l = load(logits_ + i);
            const Mask16 mask = is_at_least(l, broadcast(now));
            if (!mask) continue;
            consider(l, lane_numbers() + broadcast_u32(i), mask);
            if (score_ > score) now = floor(), score = score_;
        }
    }

    // Has the lanes of `mask` take part in the draw.
    void consider(F32x16 logits, U32x16 tokens, Mask16 mask) {
        const F32x16 x = shares(logits), scores = x + gumbel16(tokens, key_);
        mask = mask & is_at_least(x, broadcast(least_));
        unsigned better = mask & is_at_least(scores, broadcast(score_));
        if (!better) return;
        float of[16];
        int ids[16];
        store(of, scores), store(ids, tokens);
        for (; better; better &= better - 1) {
            const int lane = std::countr_zero(better);
            if (of[lane] > score_ || (of[lane] == score_ && ids[lane] < chosen_))
                score_ = of[lane], chosen_ = ids[lane];
        }
    }

    float* logits_ = nullptr;
    int vocab_ = 0, chosen_ = 0;
    int64_t key_ = 0;
    float most_ = 0, by_ = 1;      // the largest logit, and what it is a difference to is multiplied by
    float least_ = 0, score_ = 0;  // the least x that min-p leaves, and the highest x + noise so far
    bool has_nan_ = false;
    std::vector<Candidate> candidates_;
    std::vector<Original> originals_;
};
