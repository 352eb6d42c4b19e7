"""Studies: folders of flagfiles that are run and analyzed. The caller provides the tasks."""
