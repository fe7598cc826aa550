//! `highwater init`

use highwater_engine::repository::{InitOptions, Repository};
use highwater_model::format_size;

use crate::advice::{self, CliError};
use crate::args::{Global, Init};
use crate::{json, output, secrets, settings};

pub(crate) fn run(global: &Global, args: &Init) -> Result<u8, CliError> {
    let Some(encryption) = args.encryption else {
        return Err(CliError::Usage {
            message: "cannot create a repository without knowing how to encrypt it".to_owned(),
            hint: "say --encryption passphrase, --encryption keyfile or --encryption none"
                .to_owned(),
        });
    };
    let store = settings::open_store(global)?;
    let secret = secrets::for_init(global, encryption)?;
    let options = InitOptions {
        chunk_size: args.chunk_size,
        secret,
    };
    let repo = Repository::init(store, &options).map_err(CliError::Init)?;
    if global.json {
        let id = repo.id().to_string();
        output::document(&json::Created::new(
            id,
            repo.is_encrypted(),
            repo.chunk_size().bytes(),
        ))?;
    } else if !global.quiet {
        let how = if repo.is_encrypted() {
            "encrypted"
        } else {
            "not encrypted"
        };
        let chunk = format_size(repo.chunk_size().bytes());
        output::talk(&format!(
            "created repository {} ({how}, {chunk} chunks)",
            repo.id()
        ));
    }
    Ok(advice::DONE)
}
