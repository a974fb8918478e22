"""Fine-tuning on the model that serves: data, the training loop, durable jobs. No HTTP."""
