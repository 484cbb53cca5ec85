//! Whether an event is pushed: the gate of contract §3, in its order.

use super::customer::{Customer, Toggle};

/// Who speaks (`assign_type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Assign {
    /// A person of the IM's staff.
    #[default]
    Agent,
    /// `robot` or `urobot`.
    Robot,
}

/// Why the gate said no.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Suppressed {
    /// No endpoint for the plugin, and no default.
    NoPushAddress,
    /// `assign_type` is not `agent`.
    NotAgent,
    /// No message has an `im_sub_session_id` above 0.
    NoSession,
    /// The page was not opened with `h5push=true`, or that is unknown.
    H5pushNotEnabled,
    /// The customer's switch is off.
    ToggledOff,
    /// The IM server takes the customer to be online, and the switch is not on.
    CustomerOnline,
}

impl Suppressed {
    /// Every reason, for metrics that start at 0.
    pub const ALL: [Suppressed; 6] = [
        Suppressed::NoPushAddress,
        Suppressed::NotAgent,
        Suppressed::NoSession,
        Suppressed::H5pushNotEnabled,
        Suppressed::ToggledOff,
        Suppressed::CustomerOnline,
    ];

    /// The contract's word for it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Suppressed::NoPushAddress => "no_push_address",
            Suppressed::NotAgent => "not_agent",
            Suppressed::NoSession => "no_session",
            Suppressed::H5pushNotEnabled => "h5push_not_enabled",
            Suppressed::ToggledOff => "toggled_off",
            Suppressed::CustomerOnline => "customer_online",
        }
    }
}

/// What the gate looks at in an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// Whether there is an endpoint for the plugin.
    pub has_endpoint: bool,
    /// Who speaks.
    pub assign: Assign,
    /// Whether a message has an `im_sub_session_id` above 0.
    pub has_session: bool,
    /// Whether a message is a `close`.
    pub has_close: bool,
    /// Whether the IM server takes the customer to be offline.
    pub offline: bool,
}

impl Question {
    /// The next offline agent message: what the toggle call answers about.
    #[must_use]
    pub fn next_offline_message(has_endpoint: bool) -> Question {
        Question { has_endpoint, assign: Assign::Agent, has_session: true, has_close: false, offline: true }
    }
}

/// The gate: `Ok` is "push it". `customer` is as it stands after what the event itself says.
///
/// # Errors
/// The first reason of the contract's order that holds.
pub fn decide(question: Question, customer: &Customer, require_h5push: bool) -> Result<(), Suppressed> {
    if !question.has_endpoint {
        return Err(Suppressed::NoPushAddress);
    }
    if question.assign != Assign::Agent {
        return Err(Suppressed::NotAgent);
    }
    if !question.has_session {
        return Err(Suppressed::NoSession);
    }
    if require_h5push && customer.h5push != Some(true) {
        return Err(Suppressed::H5pushNotEnabled);
    }
    if customer.toggle == Toggle::Off {
        return Err(Suppressed::ToggledOff);
    }
    if !question.offline && customer.toggle != Toggle::On && !question.has_close {
        return Err(Suppressed::CustomerOnline);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::endpoint::Plugin;

    #[test]
    fn the_first_reason_in_the_contracts_order_wins() {
        let reasons = [
            Some(Suppressed::NoPushAddress),
            Some(Suppressed::NotAgent),
            Some(Suppressed::NoSession),
            Some(Suppressed::H5pushNotEnabled),
            Some(Suppressed::ToggledOff),
        ];
        // Everything is wrong at first; each row mends one more thing.
        for (mended, expected) in reasons.iter().enumerate() {
            let question = Question {
                has_endpoint: mended > 0,
                assign: if mended > 1 { Assign::Agent } else { Assign::Robot },
                has_session: mended > 2,
                has_close: false,
                offline: false,
            };
            let mut customer = Customer::new("c", Plugin::NONE);
            customer.toggle = Toggle::Off;
            customer.h5push = (mended > 3).then_some(true);
            assert_eq!(decide(question, &customer, true).err(), *expected, "row {mended}");
        }
    }

    #[test]
    fn offline_close_and_the_toggle() {
        // (offline, close, toggle) -> pushed
        let table = [
            (true, false, Toggle::Auto, true),
            (true, false, Toggle::On, true),
            (true, false, Toggle::Off, false),
            (false, false, Toggle::Auto, false),
            (false, false, Toggle::On, true),
            (false, false, Toggle::Off, false),
            (false, true, Toggle::Auto, true),
            (false, true, Toggle::On, true),
            (false, true, Toggle::Off, false),
        ];
        for (offline, has_close, toggle, pushed) in table {
            let question =
                Question { has_endpoint: true, assign: Assign::Agent, has_session: true, has_close, offline };
            let mut customer = Customer::new("c", Plugin::NONE);
            customer.h5push = Some(true);
            customer.toggle = toggle;
            assert_eq!(decide(question, &customer, true).is_ok(), pushed, "{offline} {has_close} {toggle:?}");
        }
    }

    #[test]
    fn h5push_false_and_unknown_are_the_same_and_can_be_waived() {
        for h5push in [None, Some(false)] {
            let mut customer = Customer::new("c", Plugin::NONE);
            customer.h5push = h5push;
            let question = Question::next_offline_message(true);
            assert_eq!(decide(question, &customer, true), Err(Suppressed::H5pushNotEnabled));
            assert_eq!(decide(question, &customer, false), Ok(()));
        }
    }
}
