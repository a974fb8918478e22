// The low-rank share of each token's adapters: Σ weight · B (A x), over the rank rows that it uses.
//
// A's rows carry their adapter's scaling. A pool holds a part's A as (in / 2, rows, 2), and each module's B as
// (out / 32, rank / 2, 32, 2) from the module's offset on: what vdpbf16ps and AMX multiply by, and what one task or a
// tile of outputs needs lies together. A x, times the weight, is rounded to 16 bits. Each number is one sum in one
// order, whatever tokens and rows are computed with it.
#pragma once
#include <algorithm>
#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "amx.h"
#include "matrix.h"
#include "numbers.h"

constexpr int kShrinkTokens = 16;  // of a task of A's products, at most
constexpr int kShrinkVectors = 3;  // of 16 rows of A, likewise

// y (tokens, 48) = x (tokens, 2 · pairs) times `columns` rows of A, packed as (pairs, rows, 2).
template <int tokens, int vectors>
inline void multiply_rows(const bf16* x, size_t x_stride, const bf16* a, size_t rows, int columns, int pairs,
                          float* y) {
    __m512 sum[tokens][vectors];
    for (auto& of_token : sum)
        for (auto& of : of_token) of = _mm512_setzero_ps();
    const __mmask16 last = first_lanes(columns - 16 * (vectors - 1));
    for (int pair = 0; pair < pairs; pair++, a += 2 * rows) {
        __m512bh w[vectors];
#pragma GCC unroll 3
        for (int i = 0; i < vectors; i++)
            w[i] = (__m512bh)_mm512_maskz_loadu_epi32(i == vectors - 1 ? last : 0xffff, a + 32 * i);
#pragma GCC unroll 8
        for (int token = 0; token < tokens; token++) {
            uint32_t two;
            memcpy(&two, x + token * x_stride + 2 * pair, 4);
            auto both = (__m512bh)_mm512_set1_epi32((int)two);
#pragma GCC unroll 3
            for (int i = 0; i < vectors; i++) sum[token][i] = _mm512_dpbf16_ps(sum[token][i], both, w[i]);
        }
    }
    for (int token = 0; token < tokens; token++)
        for (int i = 0; i < vectors; i++) _mm512_storeu_ps(y + (token * kShrinkVectors + i) * 16, sum[token][i]);
}

// The same by AMX, for up to 16 tokens; pairs in units of 16.
inline void multiply_rows_amx(const bf16* x, size_t x_stride, int tokens, const bf16* a, size_t rows, int columns,
                              int pairs, float* y) {
    const int vectors = (columns + 15) / 16;
    AmxShape shape;  // 0 to 2 hold the sums, 3 holds x, 4 to 6 hold A
    for (int i = 0; i < kShrinkVectors; i++) {
        const int now = std::clamp(columns - 16 * i, 1, 16);
        shape.rows[i] = (uint8_t)tokens, shape.rows[4 + i] = kAmxPairs;
        shape.bytes_of_row[i] = shape.bytes_of_row[4 + i] = (uint16_t)(now * sizeof(float));
    }
    shape.rows[3] = (uint8_t)tokens, shape.bytes_of_row[3] = 64;
    asm volatile("" ::: "memory");
    _tile_loadconfig(&shape);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int pair = 0; pair < pairs; pair += kAmxPairs, a += kAmxPairs * 2 * rows) {
        _tile_loadd(3, x + 2 * pair, x_stride * sizeof(bf16));
        _tile_loadd(4, a, 2 * rows * sizeof(bf16));
        _tile_dpbf16ps(0, 3, 4);
        if (vectors == 1) continue;
        _tile_loadd(5, a + 32, 2 * rows * sizeof(bf16));
        _tile_dpbf16ps(1, 3, 5);
        if (vectors == 2) continue;
        _tile_loadd(6, a + 64, 2 * rows * sizeof(bf16));
        _tile_dpbf16ps(2, 3, 6);
    }
    constexpr int kStride = kShrinkVectors * 16 * sizeof(float);
    _tile_stored(0, y, kStride);
    if (vectors > 1) _tile_stored(1, y + 16, kStride);
    if (vectors > 2) _tile_stored(2, y + 32, kStride);
    _tile_release();
    asm volatile("" ::: "memory");
}

// As AMX rounds, while it lives: numbers too small to be normal are 0.
class FlushesToZero {
  public:
    FlushesToZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
    ~FlushesToZero() { _mm_setcsr(before_); }
    FlushesToZero(const FlushesToZero&) = delete;
    FlushesToZero& operator=(const FlushesToZero&) = delete;

  private:
    const unsigned before_;
};

// y (32) += hidden (2 · pairs) times a tile of B, each number the one that AMX makes: of 16 pairs at a time, first the
// even and the odd ones apart, then both together and to what came before. AMX takes longer for a few tokens.
inline void expand_as_amx(const bf16* hidden, const bf16* b, int pairs, float* y) {
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    __m512 y0 = _mm512_loadu_ps(y), y1 = _mm512_loadu_ps(y + 16);
    for (int first = 0; first < pairs; first += kAmxPairs) {
        __m512 even0 = _mm512_setzero_ps(), odd0 = even0, even1 = even0, odd1 = even0;
        for (int pair = first; pair < std::min(pairs, first + kAmxPairs); pair++) {
            uint32_t two;
            memcpy(&two, hidden + 2 * pair, 4);
            const __m512 even = _mm512_castsi512_ps(_mm512_set1_epi32((int)(two << 16)));
            const __m512 odd = _mm512_castsi512_ps(_mm512_set1_epi32((int)(two & 0xffff0000)));
            const bf16* next = b + (pairs + pair) * 2 * kTile;  // what the next item of this thread will read
            _mm_prefetch((const char*)next, _MM_HINT_T0);
            _mm_prefetch((const char*)(next + kTile), _MM_HINT_T0);
            const __m512i w0 = _mm512_loadu_si512(b + pair * 2 * kTile);
            const __m512i w1 = _mm512_loadu_si512(b + pair * 2 * kTile + kTile);
            even0 = _mm512_fmadd_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(w0, 16)), even0);
            odd0 = _mm512_fmadd_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(w0, high)), odd0);
            even1 = _mm512_fmadd_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(w1, 16)), even1);
            odd1 = _mm512_fmadd_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(w1, high)), odd1);
        }
        y0 = _mm512_add_ps(y0, _mm512_add_ps(even0, odd0));
        y1 = _mm512_add_ps(y1, _mm512_add_ps(even1, odd1));
    }
    _mm512_storeu_ps(y, y0);
    _mm512_storeu_ps(y + 16, y1);
}

// The products with A of one group in one layer, and where each token finds its own.
class LoraGroup {
  public:
    void plan(const LoraPool& pool, const LoraModule* modules, const LoraSegment* segments, int num_segments,
              const double* weights, int num_tokens) {
        pool_ = pool, weights_ = weights;
        tasks_.clear(), terms_.clear(), spans_.clear();
        span_of_.assign(num_tokens, -1);
        int size = 0;
        for (int index = 0; index < num_segments; index++) {
            const LoraSegment& segment = segments[index];
            Span span{(int)segment.start, (int)segment.stop, size, 0, (int)terms_.size(), 0};
            for (int64_t i = segment.first_part; i < segment.first_part + segment.num_parts; i++) {
                const LoraPart& part = pool.parts[i];
                for (int64_t k = part.first_module; k < part.first_module + part.num_modules; k++) {
                    const LoraModule& module = modules[k];
                    terms_.push_back({(int)module.out_start, (int)(module.out_start + module.out_features),
                                      span.width + (int)module.row, (int)(module.rank / 2), module.offset});
                }
                span.width += (int)part.num_rows;
            }
            span.stop_term = (int)terms_.size();
            if (span.width == 0 || span.start == span.stop) continue;
            std::fill(span_of_.begin() + span.start, span_of_.begin() + span.stop, (int)spans_.size());
            add_tasks(span, segment);
            size += span.width * (span.stop - span.start);
            spans_.push_back(span);
        }
        hidden_.resize(size);
    }

    int num_tasks() const { return (int)tasks_.size(); }

    // hidden = weight · A x for the tokens and rows of one task; x (tokens, in).
    void shrink(int layer, int index, const bf16* x) {
        const Task& task = tasks_[index];
        const LoraPart& part = pool_.parts[task.part];
        const size_t in = pool_.in;
        const bf16* a = pool_.a + layer * pool_.a_stride + part.first_row * in + 2 * task.row;
        alignas(64) float y[kShrinkTokens * kShrinkVectors * 16];
        x += task.token * in;
        if (has_amx()) {
            multiply_rows_amx(x, in, task.tokens, a, part.num_rows, task.rows, (int)in / 2, y);
        } else {
            for (int token = 0; token < task.tokens; token += kVectorTokens)
                multiply_by_vectors(x + token * in, in, std::min(task.tokens - token, kVectorTokens), a, part.num_rows,
                                    task.rows, (int)in / 2, y + token * kShrinkVectors * 16);
        }
        const __m512 weight = _mm512_set1_ps((float)weights_[task.part]);
        for (int token = 0; token < task.tokens; token++)
            for (int row = 0; row < task.rows; row += 16)
                _mm256_mask_storeu_epi16(&hidden_[task.hidden + token * task.width + row], first_lanes(task.rows - row),
                                         (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(
                                             weight, _mm512_loadu_ps(y + token * kShrinkVectors * 16 + row))));
    }

    // Adds the share of the tokens [start, start + rows) to y (rows, 32), outputs [column, column + 32) of the group,
    // all of one module.
    void expand(int layer, int start, int rows, int column, float* y, size_t y_stride) const {
        const FlushesToZero flushes;
        AmxSums sums;
        for_spans(start, rows, [&](const Span& span, int first, int stop) {
            for (int token = first; token < stop; token += 2 * kAmxRows) {
                const int now = std::min(stop - token, 2 * kAmxRows);
                const bf16* hidden = &hidden_[span.hidden + (size_t)(token - span.start) * span.width];
                float* to = y + (token - start) * y_stride;
                for_terms(layer, span, column, [&](const Term& term, const bf16* b) {
                    if (has_amx() && now <= kFewTokens)
                        for (int row = 0; row < now; row++)
                            expand_as_amx(hidden + term.hidden + row * span.width, b, term.pairs, to + row * y_stride);
                    else if (has_amx())
                        sums.add(to, y_stride, hidden + term.hidden, span.width, now, b, term.pairs);
                    else
                        multiply<true>(hidden + term.hidden, span.width, now, b, term.pairs, to, y_stride);
                });
                sums.store();
            }
        });
    }

  private:
    static constexpr int kVectorTokens = 8;
    static constexpr int kFewTokens = 8;  // up to which AMX isn't worth its beginning
    struct Task {
        int token, tokens, part, row, rows, hidden, width;
    };
    struct Term {  // of a module: its outputs [start, stop), its part of a token's products with A, and its B
        int start, stop, hidden, pairs;
        int64_t offset;
    };
    struct Span {  // tokens [start, stop) with the same terms, and `width` products with A each, from `hidden` on
        int start, stop, hidden, width, first_term, stop_term;
    };

    // The sums of up to 32 rows in AMX's registers, whose shape changes as seldom as it may.
    class AmxSums {
      public:
        void add(float* y, size_t y_stride, const bf16* hidden, size_t stride, int rows, const bf16* b, int pairs) {
            for (int pair = 0; pair < pairs; pair += kAmxPairs) {
                const int now = std::min(pairs - pair, kAmxPairs);
                if (!block_ || rows != rows_ || now != pairs_) {
                    store();
                    block_.emplace(rows_ = rows, pairs_ = now);
                }
                if (y_ == nullptr) block_->load(y_ = y, y_stride_ = y_stride);
                const bf16* of = b + (size_t)pair * 2 * kTile;
                block_->add(hidden + 2 * pair, stride, of, of + kTile, 2 * kTile);
            }
        }
        void store() {
            if (y_ != nullptr) block_->store(y_, y_stride_);
            y_ = nullptr;
        }

      private:
        std::optional<AmxBlock> block_;
        int rows_ = 0, pairs_ = 0;
        float* y_ = nullptr;
        size_t y_stride_ = 0;
    };

    static void multiply_by_vectors(const bf16* x, size_t x_stride, int tokens, const bf16* a, size_t rows, int columns,
                                    int pairs, float* y) {
        static constexpr auto kByTokens = []<int... i>(std::integer_sequence<int, i...>) {
            return std::array{multiply_rows<i / kShrinkVectors + 1, i % kShrinkVectors + 1>...};
        }(std::make_integer_sequence<int, kVectorTokens * kShrinkVectors>{});
        kByTokens[(tokens - 1) * kShrinkVectors + (columns + 15) / 16 - 1](x, x_stride, a, rows, columns, pairs, y);
    }

    void add_tasks(const Span& span, const LoraSegment& segment) {
        constexpr int kMost = kShrinkVectors * 16;
        for (int token = span.start; token < span.stop; token += kShrinkTokens) {
            const int tokens = std::min(span.stop - token, kShrinkTokens);
            int hidden = span.hidden + (token - span.start) * span.width;
            for (int64_t part = segment.first_part; part < segment.first_part + segment.num_parts; part++) {
                const int num_rows = (int)pool_.parts[part].num_rows;
                for (int row = 0; row < num_rows; row += kMost)
                    tasks_.push_back(
                        {token, tokens, (int)part, row, std::min(num_rows - row, kMost), hidden + row, span.width});
                hidden += num_rows;
            }
        }
    }

    // Calls visit(span, first, stop) for each run of the tokens [start, start + rows) with the same terms.
    template <class Visit>
    void for_spans(int start, int rows, Visit visit) const {
        for (int token = start; token < start + rows;) {
            const int index = span_of_[token];
            if (index < 0) {
                token++;
                continue;
            }
            const int stop = std::min(spans_[index].stop, start + rows);
            visit(spans_[index], token, stop);
            token = stop;
        }
    }

    // Calls visit(term, its B's tile at `column`) for each term that has outputs there.
    template <class Visit>
    void for_terms(int layer, const Span& span, int column, Visit visit) const {
        for (int i = span.first_term; i < span.stop_term; i++) {
            const Term& term = terms_[i];
            if (column < term.start || column >= term.stop) continue;
            visit(term,
                  pool_.b + layer * pool_.b_stride + term.offset + (int64_t)(column - term.start) * 2 * term.pairs);
        }
    }

    LoraPool pool_{};
    const double* weights_ = nullptr;
    std::vector<Task> tasks_;
    std::vector<Term> terms_;
    std::vector<Span> spans_;
    std::vector<int> span_of_;
    std::vector<bf16> hidden_;
};
