"""From an output folder or a data set to data sets that others read."""
