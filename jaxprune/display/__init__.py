"""Tables, pictures and reports for a person to read."""

from jaxprune.display._columns import Picture as Picture
from jaxprune.display._columns import groups_picture as groups_picture
from jaxprune.display._columns import layer_columns as layer_columns
from jaxprune.display._curves import as_svg as as_svg
from jaxprune.display._curves import new_figure as new_figure
from jaxprune.display._curves import plot_runs as plot_runs
from jaxprune.display._environment import as_facts as as_facts
from jaxprune.display._environment import command as command
from jaxprune.display._environment import machine as machine
from jaxprune.display._functions import functions_figure as functions_figure
from jaxprune.display._intervals import Interval as Interval
from jaxprune.display._intervals import interval as interval
from jaxprune.display._pages import write_page as write_page
from jaxprune.display._pictures import groups_figure as groups_figure
from jaxprune.display._report import Stage as Stage
from jaxprune.display._report import reasons as reasons
from jaxprune.display._report import write_report as write_report
