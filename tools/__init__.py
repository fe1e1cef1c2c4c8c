"""What keeps the series running: set-up, execution of the notebooks, README, concept pictures."""
