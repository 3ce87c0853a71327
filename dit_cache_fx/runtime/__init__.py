"""Run-time bookkeeping: steps, generations, branches and their cached tensors."""
