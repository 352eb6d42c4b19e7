"""Studies: a folder of flagfiles, run and analyzed. Knows no task: the command makes those."""
