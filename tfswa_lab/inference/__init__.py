"""From waveforms and files to stems."""
