"""Row formats of public data sets, each converted to one group a row."""
