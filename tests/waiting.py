"Waiting for what other processes and threads do."
import time


def until(condition, seconds=180):
    "The value of a condition as soon as there is one; fails when that takes too long"
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
    return found
