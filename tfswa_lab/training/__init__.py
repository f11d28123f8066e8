"""From one step to a run that stops, resumes and scales out."""
