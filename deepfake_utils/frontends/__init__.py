"""Front ends: from waveforms to the time-frequency maps that models look at."""
