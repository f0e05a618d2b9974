"""``python -m benchmarks``: the reference posteriors."""

from benchmarks.posteriors import main

main()
