"""Makes small real DeepSpeed checkpoints on a CPU and judges whether real DeepSpeed resumes them.

Reading order: `models` (what is trained), `client` (what Megatron keeps beside the weights), `ranks`
(processes of one machine as a training job), `train` (engine and steps), `truth` (whole tensors, gathered and
compared), `make` and `resume` (the two commands).
"""
