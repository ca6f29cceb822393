//! `airlock up`: a sandbox that stays.

use airlock_sandbox::Paths;

use crate::commands::boot;
use crate::hiargs;
use crate::lowargs::UpArgs;
use crate::signals::Signals;

pub(crate) async fn up(args: UpArgs, verbose: bool) -> anyhow::Result<u8> {
    let paths = Paths::from_env()?;
    let mut signals = Signals::catch()?;
    let spec = hiargs::launch_spec(args.machine, args.name, false);
    match boot(&paths, &spec, &mut signals, verbose).await? {
        Ok(sandbox) => {
            drop(sandbox.keep());
            Ok(0)
        }
        Err(status) => Ok(status),
    }
}
