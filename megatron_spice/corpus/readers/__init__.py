"""One module a format. Each has two functions:

    split(file, target_bytes, options) -> list[Span]   the file as parts of about that size that can be read alone
    read(span, options, bad, progress) -> Iterator[Document]

`read` keeps in memory no more than a few blocks or one document (`options.longest`), whatever the file holds. What is
not what it should be is handed to `bad` (which counts it, or ends the run) and reading goes on after it. Where a file
cannot be used at all (a Parquet file without the text's column), `split` raises ValueError: that is before any work.
datatrove's readers are not used: they take lines and rows of any length, end a file at its first byte that is no UTF-8,
read every column, begin at a file's start only, and name neither line nor row of what they leave out.
To read another format, write such a module and enter it in `formats.FORMATS` and in units.py.
"""
