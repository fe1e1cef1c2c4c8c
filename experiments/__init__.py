"""The long runs behind the tables in results/; README.md says which run makes which table."""
