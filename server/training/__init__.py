"""Fine-tuning on the model that serves: rows, the training loop, passes and reports. No HTTP, no jobs."""
