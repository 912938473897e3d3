"""The work that all contestants do."""

import time


def work(path, seconds=0, rounds=0):
    """Wait, compute, and append the times of start and end to the file."""
    began = time.time()
    time.sleep(seconds)
    sum(number * number for number in range(rounds))
    with open(path, "a") as file:
        file.write(f"{began} {time.time()}\n")
