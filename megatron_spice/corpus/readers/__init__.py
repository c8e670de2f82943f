"""One module a format. Each has two functions:

    split(file, target_bytes, options) -> list[Span]   the file as parts of about that size that can be read alone
    read(span, options, bad, progress) -> Iterator[Document]

`read` keeps in memory no more than a few blocks or one document (`options.longest`), whatever the file holds. What is not what
it should be is handed to `bad` (which counts it, or ends the run) and reading goes on after it. Where a file cannot be
used at all (a Parquet file without the text's column), `split` raises ValueError: that is before any work.
To read another format, write such a module and enter it in `units.READERS` and `formats.FORMATS`.
"""
