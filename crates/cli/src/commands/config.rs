//! `highwater config`

use crate::advice::{self, CliError};
use crate::args::Global;
use crate::effective::Effective;
use crate::{json, output};

pub(crate) fn run(global: &Global, effective: &Effective) -> Result<u8, CliError> {
    if global.json {
        output::document(&json::Settings::new(effective))?;
        return Ok(advice::DONE);
    }
    let mut rows = vec![["SETTING", "VALUE", "FROM"].map(str::to_owned).to_vec()];
    for shown in &effective.settings {
        rows.push(vec![
            shown.setting.to_owned(),
            shown.value.clone(),
            shown.from.clone(),
        ]);
    }
    output::data(&output::table(&rows))?;
    if effective.files.is_empty() {
        output::talk("no configuration file was read");
    }
    Ok(advice::DONE)
}
