// Chooses the next token of a row of logits, and computes log-probabilities, as server/engine/sampling does in torch.
// It sorts only the candidates that the filters leave.
//
// A row's result doesn't depend on other rows: one thread computes it, and adds in a fixed order.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "numbers.h"

constexpr float kMaxNoise = 16.7f;  // greater than gumbel16's maximum, -ln(-ln(1 - 2^-24)) = 16.636

// Returns standard Gumbel noise, -ln(-ln(u)), for 16 tokens. u is the upper 23 bits of a 32-bit hash of token and key,
// plus a half (multipliers of "lowbias32", Wellons 2018).
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

class RowSampler {  // one thread's
  public:
    // Chooses a token from `logits` (vocab), which are overwritten. logprobs (1 + max_top) gets the chosen token's
    // log-probability, then those of the likeliest tokens; their ids go to top_ids (max_top), -1 after the last one.
    void run(const SampleStep& step, const SampleRow& row, float* logits, int64_t vocab, int64_t* token_id,
             float* logprobs, int64_t* top_ids) {
        logits_ = logits;
        vocab_ = static_cast<int>(vocab);
        key_ = row.key;
        double log_divisor = 0;
        if (row.num_top) log_divisor = write_top(row, logprobs + 1, top_ids);
        if (change_logits(step, row) || !row.num_top) find_largest();  // `write_top` has found the unchanged one
        const bool is_number = !has_nan_ && std::isfinite(largest_);
        if (is_number && row.temperature > 0) draw(row);
        *token_id = is_number ? chosen_ : -1;
        if (row.num_top && is_number)
            logprobs[0] = static_cast<float>(static_cast<double>(unchanged(chosen_)) - log_divisor);
    }

  private:
    struct Candidate {
        float logit, weight;  // weight: e^x, see `scaled`
        int token;
    };
    struct Original {
        int token;
        float logit;
    };
    // The order of the filters: the likelier token first, of equals the lower id.
    static bool is_before(const Candidate& a, const Candidate& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
    }

    // Finds the largest logit and the first token that has it, and whether any logit is NaN.
    void find_largest() {
        F32x16 maxima = broadcast(-std::numeric_limits<float>::infinity());
        U32x16 max_tokens = broadcast_u32(0), tokens = lane_numbers();
        Mask16 nan = 0;
        for (int i = 0; i < vocab_; i += 16, tokens = tokens + broadcast_u32(16)) {
            const F32x16 logits = load(logits_ + i);
            nan |= is_nan(logits);
            const Mask16 is_larger = is_greater(logits, maxima);
            maxima = choose(is_larger, logits, maxima);
            max_tokens = choose(is_larger, tokens, max_tokens);
        }
        has_nan_ = nan != 0;
        largest_ = reduce_max(maxima);
        const Mask16 is_largest = is_equal(maxima, broadcast(largest_));
        chosen_ = reduce_min(is_largest, max_tokens);
    }

    // Returns x = (logit - the largest logit) / temperature. The draw adds noise to it.
    F32x16 scaled(F32x16 logits) const { return (logits - broadcast(largest_)) * broadcast(inverse_temperature_); }

    // Returns the sum of e^x over the vocabulary. Parts of it are summed in fp32, and the parts in double precision.
    double sum_weights() const {
        constexpr int kPart = 512;
        double sum = 0;
        for (int start = 0; start < vocab_; start += kPart) {
            F32x16 part{};
            for (int i = start; i < std::min(start + kPart, vocab_); i += 16)
                part = part + exp16(scaled(load(logits_ + i)));
            sum += reduce_add(part);
        }
        return sum;
    }

    // Makes candidates of the tokens with a logit of at least `floor`, in order, and returns the sum of their weights.
    double collect(float floor) {
        candidates_.clear();
        double mass = 0;
        for (int i = 0; i < vocab_; i += 16) {
            const F32x16 logits = load(logits_ + i);
            unsigned mask = is_at_least(logits, broadcast(floor));
            if (!mask) continue;
            float weights[16];
            store(weights, exp16(scaled(logits)));
            for (; mask; mask &= mask - 1) {
                const int lane = std::countr_zero(mask);
                candidates_.push_back({logits_[i + lane], weights[lane], i + lane});
                mass += weights[lane];
            }
        }
        return mass;
    }

    // Makes candidates of the likeliest tokens until enough(the sum of their weights), or of all with a finite logit.
    template <class Enough>
    void collect_until(Enough enough) {
        constexpr double kFirst = 4, kLast = 64;  // distance of the floor from the largest logit
        constexpr float kLeast = std::numeric_limits<float>::lowest();
        for (double below = kFirst; below <= kLast; below *= 2)
            if (enough(collect(std::max(static_cast<float>(largest_ - below / inverse_temperature_), kLeast)))) return;
        collect(kLeast);
    }

    // Makes candidates of the `count` likeliest tokens.
    void keep_top(int64_t count) {
        collect_until([&](double) { return static_cast<int64_t>(candidates_.size()) >= count; });
        if (static_cast<int64_t>(candidates_.size()) <= count) return;
        std::nth_element(candidates_.begin(), candidates_.begin() + count, candidates_.end(), is_before);
        candidates_.resize(count);
    }

    // Keeps the likeliest candidates until their weights sum to `missing`.
    void keep_mass(double missing) {
        constexpr int kFew = 16;
        auto begin = candidates_.begin(), end = candidates_.end();
        while (end - begin > kFew) {  // candidates before `begin` are kept, those from `end` on are dropped
            const auto middle = begin + (end - begin) / 2;
            std::nth_element(begin, middle, end, is_before);
            double mass = 0;
            for (auto candidate = begin; candidate < middle; candidate++) mass += candidate->weight;
            if (mass >= missing) {
                end = middle;
            } else {
                missing -= mass;
                begin = middle;
            }
        }
        std::sort(begin, end, is_before);
        for (; begin < end && missing > 0; begin++) missing -= begin->weight;
        candidates_.erase(begin, candidates_.end());
    }

    // Writes the likeliest tokens and their log-probabilities, and returns ln Σ e^logit.
    double write_top(const SampleRow& row, float* logprobs, int64_t* top_ids) {
        find_largest();
        inverse_temperature_ = 1;
        const double log_divisor = largest_ + std::log(sum_weights());
        keep_top(row.num_top);
        std::sort(candidates_.begin(), candidates_.end(), is_before);
        for (int64_t i = 0; i < row.num_top; i++) {
            const bool is_there = i < static_cast<int64_t>(candidates_.size());
            top_ids[i] = is_there ? candidates_[i].token : -1;
            logprobs[i] = is_there ? static_cast<float>(candidates_[i].logit - log_divisor) : -INFINITY;
        }
        return log_divisor;
    }

    // Applies penalties, biases and forbidden tokens. Returns whether there were any.
    bool change_logits(const SampleStep& step, const SampleRow& row) {
        originals_.clear();
        auto note = [&](int64_t token) {
            if (row.num_top) originals_.push_back({static_cast<int>(token), logits_[token]});
        };
        const auto penalty = static_cast<float>(row.repetition_penalty);
        for (int64_t i = row.first_seen; i < row.first_seen + row.num_seen; i++) {
            float& logit = logits_[step.seen[i]];
            note(step.seen[i]);
            logit = logit < 0 ? logit * penalty : logit / penalty;
        }
        for (int64_t i = row.first_added; i < row.first_added + row.num_added; i++) {
            note(step.added_ids[i]);
            logits_[step.added_ids[i]] += static_cast<float>(step.added[i]);
        }
        if (row.forbidden == nullptr) return row.num_seen > 0 || row.num_added > 0;
        for (int i = 0; i < vocab_; i += 16) {
            const F32x16 never = broadcast(-std::numeric_limits<float>::infinity());
            store_lanes(logits_ + i, nonzero_bytes(row.forbidden + i), never);
        }
        return true;
    }
    // Returns a token's logit before `change_logits`.
    float unchanged(int token) const {
        for (const Original& original : originals_)
            if (original.token == token) return original.logit;
        return logits_[token];
    }

    // Chooses the token with the highest x + noise among those that the filters leave (Gumbel-max). Follows
    // `find_largest`.
    void draw(const SampleRow& row) {
        inverse_temperature_ = static_cast<float>(1 / row.temperature);
        min_x_ = row.min_p > 0 ? static_cast<float>(std::log(row.min_p)) : -std::numeric_limits<float>::infinity();
        score_ = -std::numeric_limits<float>::infinity();
        consider(broadcast(largest_), broadcast_u32(chosen_), 1);  // no filter drops the likeliest token
        const bool has_top_k = row.top_k > 0 && row.top_k < vocab_, has_top_p = row.top_p < 1;
        if (!has_top_k && !has_top_p) return draw_from_all();
        double total = 0;  // top-p is a share of it
        if (has_top_k) {
            keep_top(row.top_k);
            for (const Candidate& candidate : candidates_) total += candidate.weight;
        } else {
            total = sum_weights();
            collect_until([&](double mass) { return mass >= row.top_p * total; });
        }
        if (has_top_p) keep_mass(row.top_p * total);
        for (size_t start = 0; start < candidates_.size(); start += 16) {
            const int count = static_cast<int>(std::min<size_t>(16, candidates_.size() - start));
            float logits[16] = {};
            int tokens[16] = {};
            for (int i = 0; i < count; i++) {
                logits[i] = candidates_[start + i].logit;
                tokens[i] = candidates_[start + i].token;
            }
            consider(load(logits), load_u32(tokens), first_lanes(count));
        }
    }

    // Draws from the whole vocabulary. Computes no noise for tokens that couldn't win even with the greatest noise.
    void draw_from_all() {
        auto floor = [&] {  // the lowest logit that can win
            const double x = std::max(static_cast<double>(min_x_) * 1.01, static_cast<double>(score_) - kMaxNoise);
            const double lowest_logit = largest_ + x / inverse_temperature_;
            return std::max(std::nextafter(static_cast<float>(lowest_logit), -INFINITY),
                            std::numeric_limits<float>::lowest());
        };
        float lowest = floor(), score = score_;
        for (int i = 0; i < vocab_; i += 16) {
            const F32x16 logits = load(logits_ + i);
            const Mask16 mask = is_at_least(logits, broadcast(lowest));
            if (!mask) continue;
            consider(logits, lane_numbers() + broadcast_u32(i), mask);
            if (score_ > score) {
                lowest = floor();
                score = score_;
            }
        }
    }

    // Includes the lanes of `mask` in the draw.
    void consider(F32x16 logits, U32x16 tokens, Mask16 mask) {
        const F32x16 x = scaled(logits), scores = x + gumbel16(tokens, key_);
        mask = mask & is_at_least(x, broadcast(min_x_));
        unsigned better = mask & is_at_least(scores, broadcast(score_));
        if (!better) return;
        float lane_scores[16];
        int ids[16];
        store(lane_scores, scores);
        store(ids, tokens);
        for (; better; better &= better - 1) {
            const int lane = std::countr_zero(better);
            if (lane_scores[lane] > score_ || (lane_scores[lane] == score_ && ids[lane] < chosen_)) {
                score_ = lane_scores[lane];
                chosen_ = ids[lane];
            }
        }
    }

    float* logits_ = nullptr;
    int vocab_ = 0, chosen_ = 0;
    int64_t key_ = 0;
    float largest_ = 0, inverse_temperature_ = 1;
    float min_x_ = 0, score_ = 0;  // the lowest x that min-p leaves, and the highest x + noise so far
    bool has_nan_ = false;
    std::vector<Candidate> candidates_;
    std::vector<Original> originals_;
};
