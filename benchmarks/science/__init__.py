"""LoRA against full fine-tuning on six tasks, with intervals: `python -m benchmarks.science`."""
