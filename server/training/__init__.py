"""Fine-tuning of the served model: training rows, the training loop, forward and backward passes, and reports.

HTTP and the queue of jobs are elsewhere.
"""
