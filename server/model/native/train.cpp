// The forward pass of a training step, from token ids to final hidden states, and its backward pass, from the gradients
// of those to the gradients of the adapter's A and B, or of all weights. For the CPUs of serving/step.h.
//
// The same arithmetic as server/model/smollm.py with server/training/passes/trained_rows.py: what is multiplied is
// bf16, sums, the residual stream and its gradient are fp32. The base's weights are read where they lie. Each number is
// one sum in a fixed order, so that results depend neither on the number of threads nor on chance.
#include "kernels/loss.h"
#include "train_backward.h"

namespace {

class Training : public TrainBackward {
  public:
    Training(const BaseSizes& sizes, const BaseTensor* tensors, const float* rotary, const uint8_t* uses_rotary)
        : TrainBackward(sizes, tensors, rotary, uses_rotary), loss_(&team_, lm_head_, s_.vocab, s_.hidden) {}

    // See `Loss`.
    double loss(const bf16* hidden, const int64_t* targets, int64_t rows, double factor, bf16* d_hidden,
                float* d_head) {
        if (rows < 0) refuse("%ld rows", rows);
        check_ids(s_, targets, rows);
        clock_.begin();
        const double loss = loss_.run(hidden, targets, rows, factor, d_hidden, d_head);
        clock_.end(kLossPhase);
        return loss;
    }

    // See `Loss`.
    void measure(const bf16* hidden, const int64_t* targets, int64_t rows, double* losses, int64_t* likeliest) {
        if (rows < 0) refuse("%ld rows", rows);
        check_ids(s_, targets, rows);
        clock_.begin();
        loss_.measure(hidden, targets, rows, losses, likeliest);
        clock_.end(kLossPhase);
    }

    PhaseClock<TrainPhase, kTrainPhases>& clock() { return clock_; }

  private:
    Loss loss_;
};

}  // namespace

int smolora_training_create(const BaseSizes* sizes, const BaseTensor* tensors, const float* rotary,
                            const uint8_t* uses_rotary, void** training, char* error) {
    return guarded(error, [&] {
        check_sizes(*sizes);
        *training = new Training(*sizes, tensors, rotary, uses_rotary);
    });
}

void smolora_training_destroy(void* training) { delete (Training*)training; }

int smolora_training_forward(void* training, const TrainBatch* batch, bf16* hidden, char* error) {
    return guarded(error, [&] { ((Training*)training)->forward(*batch, hidden); });
}

int smolora_training_loss(void* training, const bf16* hidden, const int64_t* targets, int64_t rows, double factor,
                          bf16* d_hidden, float* d_head, double* loss, char* error) {
    return guarded(error,
                   [&] { *loss = ((Training*)training)->loss(hidden, targets, rows, factor, d_hidden, d_head); });
}

int smolora_training_measure(void* training, const bf16* hidden, const int64_t* targets, int64_t rows, double* losses,
                             int64_t* likeliest, char* error) {
    return guarded(error, [&] { ((Training*)training)->measure(hidden, targets, rows, losses, likeliest); });
}

int smolora_training_backward(void* training, const bf16* d_hidden, char* error) {
    return guarded(error, [&] { ((Training*)training)->backward(d_hidden); });
}

int smolora_training_phases(void* training, int64_t is_on, int64_t* nanoseconds, char* error) {
    return guarded(error, [&] {
        const auto spent = ((Training*)training)->clock().take(is_on != 0);
        std::copy(spent.begin(), spent.end(), nanoseconds);
    });
}
