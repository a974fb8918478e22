// A base's weights as steps of serving read them: packed once, and never written.
#pragma once
#include <vector>

#include "kernels/matrix.h"
#include "kernels/team.h"
#include "seam/guard.h"

struct ServeLayer {
    const bf16 *input_norm, *post_norm;
    Matrix qkv, o, gate_up, down;
    bool uses_rotary;
};

struct ServeBase {
    // `tensors` as smolora_create has them; the team packs.
    ServeBase(const BaseSizes& s, const BaseTensor* tensors, const uint8_t* uses_rotary, Team& team)
        : layers(s.layers) {
        const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
        embed = tensors++->values;
        for (int64_t i = 0; i < s.layers; i++) {
            ServeLayer& layer = layers[i];
            layer.uses_rotary = uses_rotary[i];
            layer.input_norm = tensors++->values;
            pack(layer.qkv, *tensors++, q + 2 * kv, s.hidden, team);
            pack(layer.o, *tensors++, s.hidden, q, team);
            layer.post_norm = tensors++->values;
            pack(layer.gate_up, *tensors++, 2 * s.intermediate, s.hidden, team);
            pack(layer.down, *tensors++, s.hidden, s.intermediate, team);
        }
        final_norm = tensors++->values;
        pack(lm_head, *tensors++, s.vocab, s.hidden, team);
    }

    std::vector<ServeLayer> layers;
    const bf16 *embed, *final_norm;
    Matrix lm_head;

  private:
    // Of 16 outputs weights are expanded by two registers of AVX2, which takes one or two threads longer than reading
    // 16 bits: these keep weights expanded.
    static bool keeps_stored(const Team& team) { return vectors::kSums >= 24 || team.size() > 2; }
    static void pack(Matrix& matrix, const BaseTensor& w, int64_t out, int64_t in, Team& team) {
        if (w.type < kBf16 || w.type > kQ8_0 || (w.type != kBf16 && w.blocks == nullptr))
            refuse("weights of type %ld", w.type);
        matrix.reserve(keeps_stored(team) ? (WeightType)w.type : kBf16, (int)out, (int)in);
        team.run([&] { team.each((int)(out / kTile), [&](int tile) { matrix.pack(w, tile); }); });
    }
};
