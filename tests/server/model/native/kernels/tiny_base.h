// A base of random weights, and steps of serving and training over it through the library's entries, every buffer of
// just the size that it must have.
#pragma once
#include <memory>
#include <optional>

#include "check.h"
#include "seam/abi.h"
#include "stored.h"

// Ends the test where the entry doesn't answer kOk.
#define SUCCEED(entry, ...)                                                       \
    do {                                                                          \
        char error[kErrorSize] = "";                                              \
        expect(entry(__VA_ARGS__, error) == kOk, "%s failed: %s", #entry, error); \
    } while (false)

struct TinyBase {
    BaseSizes sizes{64, 96, 64, 2, 6, 2, 32, 80, 1, 1e-5};  // heads in groups of three
    std::vector<std::vector<bf16>> tensors;
    std::vector<BaseTensor> table;
    std::vector<Stored> stored;
    std::vector<float> rotary;
    std::vector<uint8_t> uses_rotary{1, 0};

    explicit TinyBase(Random& random, int64_t layers = 2, int64_t max_positions = 80, int64_t head_dim = 32) {
        sizes.layers = layers, sizes.max_positions = max_positions, sizes.head_dim = head_dim;
        const int64_t q = sizes.heads * sizes.head_dim, kv = sizes.kv_heads * sizes.head_dim;
        auto add = [&](int64_t out, int64_t in) {
            tensors.push_back(random_bf16(random, (size_t)(out * in), out == 1 ? 1 : 2 / std::sqrt((double)in)));
        };
        add(sizes.vocab, sizes.hidden);
        for (int64_t layer = 0; layer < sizes.layers; layer++) {
            add(1, sizes.hidden), add(q + 2 * kv, sizes.hidden), add(sizes.hidden, q);
            add(1, sizes.hidden), add(2 * sizes.intermediate, sizes.hidden), add(sizes.hidden, sizes.intermediate);
        }
        add(1, sizes.hidden), add(sizes.vocab, sizes.hidden);
        for (const auto& tensor : tensors) table.push_back({tensor.data(), kBf16, nullptr});
        rotary.resize((size_t)(2 * sizes.max_positions * sizes.head_dim));
        for (int64_t i = 0; i < sizes.max_positions * sizes.head_dim; i++) {
            const int64_t position = i / sizes.head_dim, d = i % sizes.head_dim, half = sizes.head_dim / 2;
            const double angle = (double)position * std::pow(1e4, -(double)(d % half) / (double)half);
            rotary[i] = (float)std::cos(angle);
            rotary[sizes.max_positions * sizes.head_dim + i] = (float)(d < half ? -std::sin(angle) : std::sin(angle));
        }
    }
    // Matrices are in blocks from here on, of both types. What they stand for is in the table as well.
    void store_in_blocks(Random& random) {
        stored.reserve(tensors.size());
        for (size_t i = 0; i < tensors.size(); i++) {
            const bool is_norm = (int64_t)tensors[i].size() == sizes.hidden;
            if (is_norm) continue;
            stored.emplace_back(random, i % 2 ? kQ8_0 : kQ4_1, (int64_t)tensors[i].size(), i % 2 ? 1e-3 : 0.02);
            table[i] = stored.back().tensor();
        }
    }
    int64_t in(int group) const {
        return group == kO ? sizes.heads * sizes.head_dim : group == kDown ? sizes.intermediate : sizes.hidden;
    }
    // Of each module of a group.
    std::vector<int64_t> outs(int group) const {
        const int64_t q = sizes.heads * sizes.head_dim, kv = sizes.kv_heads * sizes.head_dim;
        if (group == kQkv) return {q, kv, kv};
        if (group == kGateUp) return {sizes.intermediate, sizes.intermediate};
        return {sizes.hidden};
    }
    int64_t out(int group) const {
        int64_t sum = 0;
        for (int64_t of : outs(group)) sum += of;
        return sum;
    }
};

// What serves or trains over a base, which must outlive it.
struct Native {
    std::unique_ptr<void, void (*)(void*)> object{nullptr, nullptr};
    int status;

    static Native serving(const TinyBase& base, int threads) {
        return Native(base, threads, smolora_create, smolora_destroy);
    }
    static Native training(const TinyBase& base, int threads) {
        return Native(base, threads, smolora_training_create, smolora_training_destroy);
    }

  private:
    Native(const TinyBase& base, int threads, decltype(&smolora_create) create, void (*destroy)(void*)) {
        BaseSizes sizes = base.sizes;
        sizes.threads = threads;
        void* created = nullptr;
        char error[kErrorSize] = "";
        status = create(&sizes, base.table.data(), base.rotary.data(), base.uses_rotary.data(), &created, error);
        object = {created, destroy};
    }
};

// One step of several sequences, some of them with adapters, and the cache that it is over.
struct Step {
    static constexpr int64_t kBlockSize = 16;
    const BaseSizes sizes;
    int64_t num_blocks = 0;
    std::vector<bf16> k, v, hidden;
    std::vector<int64_t> token_ids;
    std::vector<ServeRun> runs;
    std::vector<int32_t> blocks;
    std::vector<LoraModule> modules;
    std::vector<LoraPart> parts[kGroups];
    std::vector<LoraSegment> segments;
    std::vector<double> weights;
    std::vector<bf16> a[kGroups], b[kGroups];
    std::vector<LoraPool> pools;

    // Two adapters lie in the pools. Sequences have up to `longest` tokens in the cache.
    Step(const TinyBase& base, int num_sequences, int64_t longest)
        : sizes(base.sizes), pools(kGroups), each_((longest + kBlockSize - 1) / kBlockSize) {
        Random random(7);
        num_blocks = num_sequences * each_ + 1;
        k.resize((size_t)(sizes.layers * num_blocks * kBlockSize * sizes.kv_heads * sizes.head_dim), 0x7fc0), v = k;
        for (int i = 0; i < num_sequences; i++)
            for (int64_t block = 0; block < each_; block++)
                tables_.push_back((int32_t)(num_blocks - 1 - (i + block * num_sequences)));
        for (int group = 0; group < kGroups; group++) {
            int64_t row = 0, offset = 0;
            for (int64_t rank : {16, 4}) {
                LoraPart part{row, 0, (int64_t)modules.size(), 0, offset, 0};
                int64_t out_start = 0;
                for (int64_t out : base.outs(group)) {
                    modules.push_back({rank, part.num_rows, part.b_size, out_start, out});
                    part.num_rows += rank, part.num_modules++, part.b_size += rank * out, out_start += out;
                }
                adapters_[group].push_back(part);
                row += part.num_rows, offset += part.b_size;
            }
            a[group] = random_bf16(random, (size_t)(sizes.layers * row * base.in(group)), 0.1);
            b[group] = random_bf16(random, (size_t)(sizes.layers * offset), 0.1);
            pools[group] = {a[group].data(), b[group].data(), sizes.layers, row, offset, base.in(group), nullptr};
        }
    }

    // The next step: tokens [from, to) of the sequence `index`, of which the last `wanted` ones', or all hidden states
    // are wanted. Odd sequences are under adapters.
    void add(int index, int64_t from, int64_t to, std::optional<int64_t> wanted = {}) {
        const int64_t start = (int64_t)token_ids.size();
        Random random(index);
        for (int64_t position = 0; position < to; position++) {
            const int64_t id = random.below(sizes.vocab);
            if (position >= from) token_ids.push_back(id);
        }
        runs.push_back({start, start + to - from, from, (int64_t)blocks.size(), wanted.value_or(to - from)});
        const int64_t used = (to + kBlockSize - 1) / kBlockSize;
        blocks.insert(blocks.end(), tables_.begin() + index * each_, tables_.begin() + index * each_ + used);
        if (index % 2 == 0) return;
        segments.push_back({start, start + to - from, (int64_t)weights.size(), index % 4 == 1 ? 1 : 2});
        for (int i = 0; i < segments.back().num_parts; i++) {
            weights.push_back(i ? -0.5 : 1.0);
            for (int group = 0; group < kGroups; group++) parts[group].push_back(adapters_[group][i]);
        }
    }
    void clear() {
        token_ids.clear(), runs.clear(), blocks.clear(), segments.clear(), weights.clear();
        for (auto& of : parts) of.clear();
    }

    ServeStep tables() {
        hidden.assign(token_ids.size() * sizes.hidden, 0);
        for (int group = 0; group < kGroups; group++) pools[group].parts = parts[group].data();
        return {0,
                (int64_t)token_ids.size(),
                (int64_t)runs.size(),
                token_ids.data(),
                runs.data(),
                blocks.data(),
                (int64_t)blocks.size(),
                k.data(),
                v.data(),
                num_blocks,
                kBlockSize,
                pools.data(),
                modules.data(),
                segments.data(),
                weights.data(),
                (int64_t)modules.size(),
                (int64_t)segments.size(),
                (int64_t)weights.size(),
                hidden.data()};
    }

  private:
    int64_t each_;  // blocks of a sequence
    std::vector<int32_t> tables_;
    std::vector<LoraPart> adapters_[kGroups];
};

// Room for the gradients of a base's tensors.
struct BaseGradients {
    std::vector<std::vector<float>> values;

    explicit BaseGradients(const TinyBase& base) {
        for (const auto& tensor : base.tensors) values.emplace_back(tensor.size());
    }
    std::vector<float*> places() {
        std::vector<float*> found;
        for (auto& of : values) found.push_back(of.data());
        return found;
    }
    void clear() {
        for (auto& of : values) std::fill(of.begin(), of.end(), 0);
    }
};

// One batch of texts, an adapter with uneven ranks and one group without any rows, and its gradients.
struct Texts {
    int64_t num_tokens;
    std::vector<int64_t> token_ids, starts{0};
    std::vector<bf16> hidden;
    std::vector<TrainGroup> lora;
    std::vector<std::vector<TrainModule>> modules;
    std::vector<std::vector<bf16>> weights;
    std::vector<float> gradients;
    std::vector<uint64_t> dropout_keys;
    std::vector<float*> d_weights;  // of the base's tensors; none: it is frozen

    Texts(const TinyBase& base, const std::vector<int64_t>& lengths, bool has_dropout) {
        Random random(11);
        for (int64_t length : lengths) starts.push_back(starts.back() + length);
        num_tokens = starts.back();
        for (int64_t i = 0; i < num_tokens; i++) token_ids.push_back(random.below(base.sizes.vocab));
        hidden.resize((size_t)(num_tokens * base.sizes.hidden));
        const int64_t num_groups = base.sizes.layers * kGroups;
        modules.resize(num_groups);
        for (int64_t i = 0; i < num_groups; i++) {
            const int group = (int)(i % kGroups);
            int64_t row = 0, out_start = 0;
            for (int64_t out : base.outs(group)) {
                const int64_t rank = i == kO ? 0 : row ? 16 : 32, trained = rank - (row ? 3 : 0);
                const auto a_start = (int64_t)gradients.size(), b_start = a_start + trained * base.in(group);
                if (rank) modules[i].push_back({row, rank, out_start, out, trained, 1, a_start, b_start, 1});
                gradients.resize(b_start + trained * out);
                row += rank, out_start += out;
            }
            weights.push_back(random_bf16(random, (size_t)(row * base.in(group)), 0.2));
            weights.emplace_back(row * out_start);
            for (const TrainModule& module : modules[i])
                for (int64_t r = module.row; r < module.row + module.rank; r++)
                    for (int64_t c = module.out_start; c < module.out_start + module.out_features; c++)
                        weights.back()[r * out_start + c] = to_bf16((float)random.uniform(-0.2, 0.2));
            lora.push_back({nullptr, nullptr, row, nullptr, (int64_t)modules[i].size()});
        }
        for (int64_t i = 0; i < num_groups; i++) {
            lora[i].a = weights[2 * i].data(), lora[i].b = weights[2 * i + 1].data();
            lora[i].modules = modules[i].data();
        }
        for (int64_t i = 0; has_dropout && i < num_tokens; i++) dropout_keys.push_back(random.next());
    }
    TrainBatch batch(bool has_backward = true) {
        const bool is_frozen = d_weights.empty();
        return {num_tokens,
                (int64_t)starts.size() - 1,
                token_ids.data(),
                starts.data(),
                lora.data(),
                gradients.data(),
                (int64_t)gradients.size(),
                dropout_keys.empty() ? nullptr : dropout_keys.data(),
                kDropoutShares / 4,
                4.0 / 3,
                has_backward,
                is_frozen ? nullptr : d_weights.data()};
    }
    // Of weights[i], laid out as they are.
    std::vector<float> gradient(const TinyBase& base, size_t i) const {
        std::vector<float> found(weights[i].size());
        const int64_t in = base.in((int)(i / 2 % kGroups));
        const int64_t out = lora[i / 2].rows ? (int64_t)weights[i / 2 * 2 + 1].size() / lora[i / 2].rows : 0;
        for (const TrainModule& module : modules[i / 2])
            for (int64_t r = 0; r < module.trained; r++) {
                for (int64_t c = 0; i % 2 == 0 && c < in; c++)
                    found[(module.row + r) * in + c] = gradients[module.a_start + r * in + c];
                for (int64_t c = 0; i % 2 == 1 && c < module.out_features; c++)
                    found[(module.row + r) * out + module.out_start + c] =
                        gradients[module.b_start + c * module.trained + r];
            }
        return found;
    }
};
