"""Documents out of Arrow's record batches, which both Parquet and Arrow files give.

Values are taken one by one from the batch's buffers (strings of every width, bytes, dictionaries), so a column that
spells one huge value for every row never holds more than one copy. Offsets and indices of a damaged file are checked
before any of them is followed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.types as types

from megatron_spice.corpus.documents import BadHere, Document, ReadOptions, Span
from megatron_spice.corpus.inputs import InputFile

_AS_BYTES = {
    pa.string(): pa.binary(),
    pa.large_string(): pa.large_binary(),
    pa.string_view(): pa.binary_view(),
}


def needed_columns(schema: pa.Schema, file: InputFile, options: ReadOptions) -> list[str]:
    """The columns to read: the text's, and the source's where there is one that is asked for.

    Raises:
        ValueError: the text's column is missing, or a column holds no text.
    """
    if options.text_key not in schema.names:
        raise ValueError(
            f"{file.path} has no column `{options.text_key}`; it has {_listed(schema.names)}: name one by --text-key"
        )
    names = [options.text_key]
    if options.source_key in schema.names and not file.override:
        names.append(options.source_key)
    for name, option in zip(names, ("--text-key", "--source-key")):
        if len(schema.get_all_field_indices(name)) > 1:
            raise ValueError(f"{file.path} has more than one column `{name}`")
        kind = schema.field(name).type
        if not _is_text(kind.value_type if types.is_dictionary(kind) else kind):
            raise ValueError(f"{file.path}: column `{name}` is {kind}, not text; name another by {option}")
    return names


def documents(
    batch: pa.RecordBatch, names: list[str], span: Span, before: int, bad: BadHere, longest: int
) -> Iterator[Document]:
    """The batch's rows; `before` rows of the span came before it. ArrowInvalid when the batch is damaged."""
    columns = [_checked(batch.column(batch.schema.get_field_index(name))) for name in names]
    label = span.file.label
    for row in range(batch.num_rows):
        try:
            text = _value(columns[0][row], longest)
            source = _value(columns[1][row], longest) if len(columns) > 1 else None
        except ValueError as error:
            reason = f"not UTF-8 (byte {error.start})" if isinstance(error, UnicodeDecodeError) else str(error)
            bad(before + row + 1, reason)
            continue
        if text is None:
            bad(before + row + 1, f"`{names[0]}` is null")
            continue
        yield Document(text, label(source), span, before + row + 1)


def _is_text(kind: pa.DataType) -> bool:
    return kind in _AS_BYTES or kind in _AS_BYTES.values()


def _checked(column: pa.Array) -> pa.Array:
    """The column as bytes (text is decoded value by value, so that one bad value costs one row), all offsets valid."""
    if types.is_dictionary(column.type):
        column = pa.DictionaryArray.from_arrays(column.indices, _checked(column.dictionary))
    elif column.type in _AS_BYTES:
        column = column.view(_AS_BYTES[column.type])
    column.validate(full=True)
    return column


def _value(scalar: pa.Scalar, longest: int) -> str | None:
    if isinstance(scalar, pa.DictionaryScalar):
        scalar = scalar.value
    data = scalar.as_buffer() if scalar.is_valid else None
    if data is None:
        return None
    if data.size > longest:
        raise ValueError(f"longer than {longest >> 20} MiB")
    return str(data, "utf-8")


def _listed(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
