"""Tables, pictures and reports for a person to read."""

from jaxprune.display._columns import layer_columns as layer_columns
from jaxprune.display._pictures import groups_figure as groups_figure
from jaxprune.display._report import Html as Html
from jaxprune.display._report import Interval as Interval
from jaxprune.display._report import aside as aside
from jaxprune.display._report import bar as bar
from jaxprune.display._report import cards as cards
from jaxprune.display._report import code as code
from jaxprune.display._report import figure as figure
from jaxprune.display._report import heading as heading
from jaxprune.display._report import interval as interval
from jaxprune.display._report import machine as machine
from jaxprune.display._report import new_figure as new_figure
from jaxprune.display._report import panels as panels
from jaxprune.display._report import plot_runs as plot_runs
from jaxprune.display._report import section as section
from jaxprune.display._report import table as table
from jaxprune.display._report import text as text
from jaxprune.display._report import write_page as write_page
