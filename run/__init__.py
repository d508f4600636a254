"""What surrounds the loop: options, a run's folder, report, processes, downloads, scores of GLUE."""
