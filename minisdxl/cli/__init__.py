"""Parts of the commands: options, the pictures of a run, prompt and picture files, previews and reports."""
