"""Run-time bookkeeping: steps, generations, branches and their held tensors."""
