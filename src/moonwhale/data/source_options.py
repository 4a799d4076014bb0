"""The options that name the text or the conversations to read."""

import typing
from dataclasses import dataclass

from moonwhale.data.hub_sets import DATA_HELP
from moonwhale.options import option

if typing.TYPE_CHECKING:
    from moonwhale.data.source import Source

SPLIT_HELP = "split of a hub set, or of a folder with splits (train)"
COLUMNS_HELP = "columns of a table or hub set to read, as A,B"


@dataclass
class SourceOptions:
    """The arguments of `load_source` as options."""

    data: str = option("chitchat", DATA_HELP, group="data")
    data_split: str | None = option(None, SPLIT_HELP, group="data")
    data_columns: list[str] | None = option(None, COLUMNS_HELP, group="data")
    data_documents: int | None = option(
        None, "read only the first N documents; a hub set is then streamed, not downloaded (all)", group="data"
    )

    def load_source(self) -> "Source":
        from moonwhale.data.loading import load_source

        return load_source(self.data, self.data_split, self.data_columns, self.data_documents)
