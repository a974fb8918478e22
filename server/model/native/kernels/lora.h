// The low-rank share of each token's adapters: Σ weight · B (A x), over the rank rows that it uses.
//
// A's rows carry their adapter's scaling. A pool holds A as (rows, in), and each module's B as (out / 32, rank, 32)
// from the module's offset on, so that what a tile of outputs needs lies together.
#pragma once
#include <algorithm>
#include <vector>

#include "numbers.h"

// The products with A of one group in one layer, and where each token finds its own.
class LoraGroup {
  public:
    void plan(const LoraPool& pool, const LoraModule* modules, const LoraSegment* segments, int num_segments,
              const double* weights, int num_tokens) {
        pool_ = pool, modules_ = modules, segments_ = segments, weights_ = weights;
        tasks_.clear();
        segment_of_.assign(num_tokens, -1);
        first_.assign(num_tokens, 0);
        int size = 0;
        for (int index = 0; index < num_segments; index++) {
            const LoraSegment& segment = segments[index];
            for (int64_t token = segment.start; token < segment.stop; token++) {
                segment_of_[token] = index;
                first_[token] = size;
                for (int64_t part = segment.first_part; part < segment.first_part + segment.num_parts; part++)
                    for (int64_t row = 0; row < pool.parts[part].num_rows; row += kRows) {
                        int rows = (int)std::min<int64_t>(kRows, pool.parts[part].num_rows - row);
                        tasks_.push_back({(int)token, (int)part, (int)row, rows, size});
                        size += rows;
                    }
            }
        }
        hidden_.resize(size);
    }

    int num_tasks() const { return (int)tasks_.size(); }

    // hidden = weight · A x for the few rows of one task; x (tokens, in).
    void shrink(int layer, int index, const bf16* x) {
        const Task& task = tasks_[index];
        const int64_t in = pool_.in;
        const bf16* a = pool_.a + layer * pool_.a_stride + (pool_.parts[task.part].first_row + task.row) * in;
        x += task.token * in;
        __m512 sum[kRows];
        for (auto& row : sum) row = _mm512_setzero_ps();
        if (task.rows == kRows) {
            for (int64_t i = 0; i < in; i += 32) {
                __m512bh value = load_pairs(x + i);
#pragma GCC unroll 8
                for (int row = 0; row < kRows; row++)
                    sum[row] = _mm512_dpbf16_ps(sum[row], value, load_pairs(a + row * in + i));
            }
        } else {
            for (int row = 0; row < task.rows; row++)
                for (int64_t i = 0; i < in; i += 32)
                    sum[row] = _mm512_dpbf16_ps(sum[row], load_pairs(x + i), load_pairs(a + row * in + i));
        }
        for (int row = 0; row < task.rows; row++)
            hidden_[task.hidden + row] = (float)weights_[task.part] * _mm512_reduce_add_ps(sum[row]);
    }

    // Brings closer what `expand` will read for the tokens [start, stop).
    void prefetch(int layer, int start, int stop, int64_t column) const {
        for (int token = start, last = -1; token < stop; token++) {
            if (segment_of_[token] == last || segment_of_[token] < 0) continue;
            last = segment_of_[token];
            for_rows(layer, token, column,
                     [](const bf16* b, const float*) { _mm_prefetch((const char*)b, _MM_HINT_T0); });
        }
    }

    // Adds the token's share to y, which holds outputs [column, column + 32) of the group, all of one module.
    void expand(int layer, int token, int64_t column, float* y) const {
        if (segment_of_[token] < 0) return;
        __m512 y0 = _mm512_loadu_ps(y), y1 = _mm512_loadu_ps(y + 16);
        for_rows(layer, token, column, [&](const bf16* b, const float* hidden) {
            y0 = _mm512_fmadd_ps(_mm512_set1_ps(*hidden), load_bf16(b), y0);
            y1 = _mm512_fmadd_ps(_mm512_set1_ps(*hidden), load_bf16(b + 16), y1);
        });
        _mm512_storeu_ps(y, y0);
        _mm512_storeu_ps(y + 16, y1);
    }

  private:
    static constexpr int kRows = 8;  // of A at once
    struct Task {
        int token, part, row, rows, hidden;
    };
    // Calls visit(where B's outputs from `column` on lie, where the product with A does) for each row of the token's
    // adapters.
    template <class Visit>
    void for_rows(int layer, int token, int64_t column, Visit visit) const {
        const LoraSegment& segment = segments_[segment_of_[token]];
        const float* hidden = hidden_.data() + first_[token];
        for (int64_t index = segment.first_part; index < segment.first_part + segment.num_parts; index++) {
            const LoraPart& part = pool_.parts[index];
            for (int64_t i = part.first_module; i < part.first_module + part.num_modules; i++) {
                const LoraModule& module = modules_[i];
                const int64_t inside = column - module.out_start;
                if (inside < 0 || inside >= module.out_features) continue;
                const bf16* b = pool_.b + layer * pool_.b_stride + module.offset + inside * module.rank;
                for (int64_t row = 0; row < module.rank; row++) visit(b + row * 32, hidden + module.row + row);
            }
            hidden += part.num_rows;
        }
    }

    LoraPool pool_{};
    const LoraModule* modules_ = nullptr;
    const LoraSegment* segments_ = nullptr;
    const double* weights_ = nullptr;
    std::vector<Task> tasks_;
    std::vector<int> segment_of_, first_;
    std::vector<float> hidden_;
};
