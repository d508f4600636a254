"""What surrounds the loop: options, folder, report, processes, downloads, GLUE's scores."""
