"""What has to hold on a GPU. Each test runs on the CPU too; marked `gpu` it runs on a device.

make gpu    # these on the GPU, other tests that need one, and the benchmark
"""
