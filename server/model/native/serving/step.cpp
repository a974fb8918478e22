// The entries of serving.
#include "step.h"

int smolora_create(const BaseSizes* sizes, const BaseTensor* tensors, const float* rotary, const uint8_t* uses_rotary,
                   void** model, char* error) {
    return guarded(error, [&] {
        check_sizes(*sizes);
        *model = new Model(*sizes, tensors, rotary, uses_rotary);
    });
}

void smolora_destroy(void* model) { delete (Model*)model; }

int smolora_forward(void* model, const ServeStep* step, char* error) {
    return guarded(error, [&] { ((Model*)model)->forward(*step); });
}

int smolora_logits(void* model, const bf16* hidden, int64_t rows, float* logits, char* error) {
    return guarded(error, [&] { ((Model*)model)->project(hidden, rows, logits); });
}

int smolora_sample(void* model, const SampleStep* step, char* error) {
    return guarded(error, [&] { ((Model*)model)->sample(*step); });
}

int smolora_draw(void* model, const ServeStep* step, const SampleStep* sampling, char* error) {
    return guarded(error, [&] { ((Model*)model)->draw(*step, *sampling); });
}

int smolora_phases(void* model, int64_t is_on, int64_t* nanoseconds, char* error) {
    return guarded(error, [&] {
        const auto spent = ((Model*)model)->clock().take(is_on != 0);
        std::copy(spent.begin(), spent.end(), nanoseconds);
    });
}
