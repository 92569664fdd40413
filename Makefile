.PHONY: faults

# Every kill, every damaged file, every bad input; the tests' own run takes a sample. Figures are printed at the end.
faults:
	O2MKD_FAULTS=all OMP_NUM_THREADS=1 pytest tests/faults --no-cov -q
