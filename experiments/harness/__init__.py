"""What every experiment shares: training, rounds, runs, measurements, pages."""
