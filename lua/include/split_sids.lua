-- Take a user's list of connections apart: '<length of the sid>:<sid>' for each, in the order of registration, and
-- after a '=' the answer of the user's last registration, kept in case the call is sent again: its token, then the
-- answer, which begins with the time in us as a number of 8 bytes. Gives the sids, and where in the list the token
-- begins (past the end if there is none).
local function split_sids(list)
  local sids, position = {}, 1
  while list and position <= #list do
    local length, first = list:match('^(%d+):()', position)
    if not length then
      return sids, position + 1
    end
    position = first + length
    sids[#sids + 1] = list:sub(first, position - 1)
  end
  return sids, position
end
